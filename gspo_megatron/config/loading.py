"""From YAML to a checked `Recipe`: `base:` inheritance, dotted overrides, errors as sentences."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding


class RecipeError(ValueError):
    """A recipe that cannot be used; `findings` holds one entry a fault."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("\n".join(str(finding) for finding in findings))
        self.findings = tuple(findings)


def refuse(code: str, key: str, message: str, fix: str) -> RecipeError:
    """A `RecipeError` of one finding."""
    return RecipeError([Finding(code, "error", key, message, fix)])


def read_tree(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a recipe file, its bases and the overrides.

    Args:
        path: YAML file; its `base:` is a path relative to it.
        overrides: `section.key=value` items, values in YAML syntax.

    Returns:
        One plain tree, not checked against the schema yet.

    Raises:
        RecipeError: unreadable file or override, or sections that do not fit their base.
    """
    merged = _read(Path(path), seen=())
    for item in overrides:
        merged = _merge(merged, _read_override(item), item)
    return _to_plain(merged, str(path))


def parse(tree: dict[str, Any]) -> Recipe:
    """Check a plain tree against the schema; `model.architecture` stays a mapping, which `models.resolve` reads.

    Raises:
        RecipeError: unknown key, wrong type, broken rule; every fault at once.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(explain_faults(error, Recipe)) from None


def read_model_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face directory as it is. Raises RecipeError naming the missing file."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise refuse(
            "model-file-missing", "model.path", f"{file} does not exist", "name a Hugging Face model directory"
        )
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise refuse("model-file-broken", "model.path", f"{file} is not a JSON object: {error}", "fix it") from None


def save_resolved(recipe: Recipe, path: Path) -> None:
    """Write the complete recipe, as it will be run."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json"))))


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    resolved = path.resolve()
    if not path.is_file():
        raise refuse(
            "recipe-missing",
            "recipe",
            f"{path} does not exist",
            "give the path of a YAML recipe, e.g. recipes/tiny_moe.yaml",
        )
    if resolved in seen:
        raise refuse("base-cycle", "base", f"{path} inherits from itself", "remove one `base:` of the cycle")
    try:
        tree = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException) as error:
        raise refuse(
            "recipe-unreadable", "recipe", f"{path} is not YAML: {' '.join(str(error).split())}", "fix the line"
        ) from None
    if not isinstance(tree, DictConfig):
        raise refuse("recipe-unreadable", "recipe", f"{path} holds no mapping", "write `section:` keys at its top")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(_read(path.parent / str(base), (*seen, resolved)), tree, str(path))


def _merge(below: DictConfig, above: DictConfig, where: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(below, above)
    # OmegaConf raises a bare TypeError for a list over a mapping.
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise refuse(
            "recipe-unreadable",
            "recipe",
            f"{where} does not fit its base: {reason}",
            "keep sections sections, lists lists",
        ) from None
    assert isinstance(merged, DictConfig)
    return merged


def _read_override(item: str) -> DictConfig:
    key, sign, _ = item.partition("=")
    if not sign or not key or key.startswith("-"):
        raise refuse("override-form", item, "is not of the form section.key=value", "write e.g. trainer.max_steps=10")
    try:
        return OmegaConf.from_dotlist([item])
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise refuse(
            "override-form",
            key,
            f"{item} cannot be read: {' '.join(str(error).split())}",
            "quote the value as YAML wants it",
        ) from None


def _to_plain(tree: Any, where: str) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise refuse(
            "recipe-unreadable", "recipe", f"{where}: {' '.join(str(error).split())}", "fix the reference"
        ) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def explain_faults(error: ValidationError, model: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[Finding]:
    """One sentence for each fault that pydantic found.

    Args:
        error: what the validation raised.
        model: the class that was validated.
        prefix: place of that class in the recipe: `("model", "architecture")`.
    """
    return [_explain(fault, model, prefix) for fault in error.errors()]


def _explain(fault: Any, model: type[BaseModel], prefix: tuple[str, ...]) -> Finding:
    inner = tuple(str(part) for part in fault["loc"])
    path = prefix + inner
    key = ".".join(path) or "recipe"
    if fault["type"] == "extra_forbidden":
        names = _fields_at(model, inner[:-1])
        close = difflib.get_close_matches(path[-1], names, n=1)
        fix = f"did you mean {close[0]}?" if close else f"known keys here: {', '.join(sorted(names))}"
        return Finding("unknown-key", "error", key, "is not a key of the recipe", fix)
    if fault["type"] == "missing":
        return Finding("missing-key", "error", key, "is missing", "set it")
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":
        rule, _, fix = message.rpartition("; ")
        return Finding("rule", "error", key, rule or message, fix if rule else "see the key's documentation")
    return Finding(
        "wrong-value",
        "error",
        key,
        f"{fault['input']!r}: {message[0].lower()}{message[1:]}",
        "set a value of that kind",
    )


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Names of the keys that may stand at a dotted place of a section."""
    for part in path:
        if part not in model.model_fields:
            return []
        found = _section_of(model.model_fields[part].annotation)
        if found is None:
            return []
        model = found
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)
