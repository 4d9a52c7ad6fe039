"""Read a YAML file into a checked `Recipe`: `base:` inheritance, dotted overrides, errors as sentences."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from gspo_megatron.config.field_rules import read_section, section_of
from gspo_megatron.config.override_text import read_override
from gspo_megatron.config.recipe_paths import absolute_path, place_paths
from gspo_megatron.config.refusal import RecipeError, key_text, quote, refuse
from gspo_megatron.config.resolved_file import save_resolved
from gspo_megatron.config.schema import Recipe
from gspo_megatron.config.yaml_text import read_yaml_file
from gspo_megatron.types import Finding

__all__ = [
    "RecipeError",
    "parse",
    "read_model_config",
    "read_resolved_tree",
    "read_tree",
    "refuse",
    "save_resolved",
    "validate",
]


def read_tree(path: Path, overrides: Iterable[str] = (), started_in: Path | None = None) -> dict[str, Any]:
    """Read a recipe file, its bases and the overrides.

    Args:
        path: YAML file; its `base:` and its paths are relative to it.
        overrides: `section.key=value` items. The type of the key decides how the value is read (`field_rules`).
        started_in: what the paths of the overrides are relative to; null = the present directory.

    Returns:
        One tree of texts and values, not checked against the schema yet.

    Raises:
        RecipeError: unreadable file or override, or sections that do not fit their base.
    """
    merged = _read(Path(path), seen=())
    for item in overrides:
        tree = read_override(item)
        tree = place_paths(tree, Recipe, started_in) if started_in else tree
        merged = _merge(merged, tree, quote(item), ())
    return merged


def read_resolved_tree(path: Path) -> dict[str, Any]:
    """Read a `recipe.resolved.yaml`, which has neither base nor overrides left. Raises RecipeError."""
    return _mapping(read_yaml_file(Path(path), by_hand=False), path)


def parse(tree: Mapping[str, Any]) -> Recipe:
    """Check a tree against the schema. `model.architecture` stays a mapping, which `models.resolve` reads.

    Raises:
        RecipeError: unknown key, wrong type or broken rule. It holds every fault.
    """
    return validate(tree, Recipe)


def validate[M: BaseModel](tree: Mapping[str, Any], model: type[M], prefix: tuple[str, ...] = ()) -> M:
    """Read the texts of a tree by the types of a section, and check them against it.

    Args:
        tree: texts and values.
        model: class of the section.
        prefix: path of the section in the recipe, e.g. `("model", "architecture")`.

    Raises:
        RecipeError: every fault.
    """
    values, faults = read_section(tree, model, prefix)
    try:
        checked = model.model_validate(values)
    except ValidationError as error:
        wrong = [fault.key for fault in faults]
        # The schema only repeats what is said of a value, and cannot judge the sections around it.
        others = [_explain(fault, model, prefix) for fault in error.errors()]
        faults += [other for other in others if not any(f"{key}.".startswith(f"{other.key}.") for key in wrong)]
        raise RecipeError(faults) from None
    if faults:
        raise RecipeError(faults)
    return checked


def read_model_config(directory: Path) -> dict[str, Any]:
    """Read the `config.json` of a Hugging Face directory. Raises RecipeError with the name of a missing file."""
    file = Path(directory) / "config.json"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        message = f"{file} does not exist" if missing else f"{key_text([str(file)])} cannot be read: {error.strerror}"
        raise refuse("model-file-missing", "model.path", message, "name a Hugging Face model directory") from None
    except ValueError as error:
        raise refuse("model-file-broken", "model.path", f"{file} is not UTF-8: {error}", "fix it") from None
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it has no keys at its top")
    except (ValueError, RecursionError) as error:
        raise refuse("model-file-broken", "model.path", f"{file} is not a JSON object: {error}", "fix it") from None
    return values


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    # A name that is no path (too long, with a NUL) is no file either.
    try:
        resolved, found = path.resolve(), path.is_file()
    except (OSError, RuntimeError, ValueError):  # a loop of links is a RuntimeError
        resolved, found = path, False
    if not found:
        raise refuse(
            "recipe-missing",
            "recipe",
            f"{key_text([str(path)])} does not exist or is no file",
            "give the path of a YAML recipe, e.g. recipes/tiny_moe.yaml",
        )
    if resolved in seen:
        raise refuse("base-cycle", "base", f"{path} inherits from itself", "remove one `base:` of the cycle")
    tree = dict(_mapping(read_yaml_file(path), path))
    base = tree.pop("base", None)
    tree = place_paths(tree, Recipe, path.parent)
    if base is None or base == "null":
        return tree
    values, faults = read_section({"base": base}, _Base)
    if faults or not isinstance(values["base"], str):
        fix = "give the path of a recipe, relative to this file"
        raise RecipeError(faults) if faults else refuse("base-form", "base", f"{path}: is not a path", fix)
    try:
        below = absolute_path(values["base"], path.parent) if values["base"].startswith("~") else values["base"]
    except ValueError as error:
        raise refuse("base-form", "base", *str(error).split("; ")) from None
    return _merge(_read(path.parent / below, (*seen, resolved)), tree, str(path), ())


class _Base(BaseModel):
    """The one key of a recipe file that is not a key of the recipe."""

    base: Path


def _mapping(tree: Any, path: Path) -> dict[str, Any]:
    if isinstance(tree, dict):
        return tree
    raise refuse("recipe-unreadable", "recipe", f"{path} holds no mapping", "write `section:` keys at its top")


def _merge(below: dict[str, Any], above: Mapping[str, Any], where: str, key: tuple[str, ...]) -> dict[str, Any]:
    """Lay one tree over another: mappings are merged, anything else is replaced."""
    merged = dict(below)
    for name, value in above.items():
        old, here = below.get(name), (*key, name)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merge(old, value, where, here)
        elif (isinstance(old, dict) and isinstance(value, list)) or (isinstance(old, list) and isinstance(value, dict)):
            kinds = ("a list", "a mapping") if isinstance(value, list) else ("a mapping", "a list")
            message = f"{where} does not fit its base: {key_text(here)} is {kinds[0]} over {kinds[1]}"
            raise refuse(
                "recipe-unreadable", "recipe", message, "override a section with a section and a list with a list"
            )
        merged[name] = value
    return merged


def _explain(fault: Any, model: type[BaseModel], prefix: tuple[str, ...]) -> Finding:
    """One sentence for one pydantic fault."""
    inner = tuple(str(part) for part in fault["loc"])
    path = prefix + inner
    key = key_text(path) or "recipe"
    if fault["type"] == "extra_forbidden":
        section = _section_at(model, inner[:-1])
        reason = getattr(section, "refused", {}).get(path[-1])
        if reason is not None:
            return Finding("engine-key", "error", key, f"{quote(fault['input'])} {reason[0]}", reason[1])
        names = list(section.model_fields) if section else []
        close = difflib.get_close_matches(path[-1][:100], names, n=1)
        fix = f"known keys here: {', '.join(sorted(names))}" if names else "remove it"
        fix = f"did you mean {close[0]}?" if close else fix
        return Finding("unknown-key", "error", key, "is not a key of the recipe", fix)
    if fault["type"] == "missing":
        return Finding("missing-key", "error", key, "is missing", "set it")
    message = "".join(c if c.isprintable() else " " for c in str(fault["msg"]).removeprefix("Value error, "))
    if fault["type"] == "value_error":
        rule, _, fix = message.rpartition("; ")
        rule, fix = (rule, fix) if rule else (message, "see the key's documentation")
        # A rule of a section that begins with one of its keys, and speaks of no other, is that key's.
        section, begins = _section_at(model, inner), re.match(r"(\w+)=", rule)
        named = set(re.findall(r"\w+", rule)) & set(section.model_fields if section else ())
        if begins and named == {begins[1]}:
            key = key_text((*path, begins[1]))
        # A rule repeats the value, which may be of any length.
        return Finding("rule", "error", key, rule if len(rule) < 400 else f"{rule[:400]}...", fix)
    value, section = quote(fault["input"]), _section_at(model, inner)
    if section is not None and fault["type"] in ("model_type", "model_attributes_type"):
        names = ", ".join(section.model_fields)
        fix = f"write its keys below it ({names}), or leave it out"
        return Finding("wrong-value", "error", key, f"{value} stands where a section is expected", fix)
    rule = message.replace("valid string", "text").replace("valid dictionary", "mapping")
    return Finding("wrong-value", "error", key, f"{value}: {rule[0].lower()}{rule[1:]}", "set a value of that type")


def _section_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The section at a dotted path."""
    found: type[BaseModel] | None = model
    for part in path:
        if found is None or part not in found.model_fields:
            return None
        found = section_of(found.model_fields[part].annotation)
    return found
