"""From a recipe's raw `model` section to its typed architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gspo_megatron.config.field_rules import read_section
from gspo_megatron.config.loading import (
    RecipeError,
    parse,
    read_model_config,
    read_resolved_tree,
    read_tree,
    refuse,
    validate,
)
from gspo_megatron.config.model_section import Architecture, ModelSection
from gspo_megatron.config.refusal import quote
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.registry import BY_TYPE, DEFAULT_TYPE, FAMILIES
from gspo_megatron.types import Finding

PLACE = ("model", "architecture")
"""Where the keys of an architecture stand in a recipe."""


def load_recipe(path: Path, overrides: Iterable[str] = (), started_in: Path | None = None) -> Recipe:
    """Read a recipe, its bases and the overrides, with its typed architecture in `recipe.arch`.

    Args:
        path: YAML file; its `base:` and its paths are relative to it.
        overrides: `section.key=value` items, read by the type of the key.
        started_in: what the paths of the overrides are relative to; null = the present directory.

    Raises:
        RecipeError: unreadable file, unknown key, wrong type, broken rule; every fault at once.
    """
    return parse_recipe(read_tree(path, overrides, started_in))


def load_resolved(path: Path) -> Recipe:
    """Read a `recipe.resolved.yaml`, which has neither base nor overrides left."""
    return parse_recipe(read_resolved_tree(path))


def parse_recipe(tree: Mapping[str, Any]) -> Recipe:
    """A resolved recipe from a tree of texts and values. Raises RecipeError with every fault at once."""
    try:
        recipe = parse(tree)
    except RecipeError as error:
        model = tree.get("model")
        values = model.get("architecture") if isinstance(model, dict) else None
        raise RecipeError([*error.findings, *(_faults_of(values) if isinstance(values, dict) else ())]) from None
    return resolve(recipe)


def resolve(recipe: Recipe) -> Recipe:
    """The same recipe with its typed architecture, from `model.architecture` or else from `model.path`/config.json."""
    model = recipe.model
    if model.architecture is not None:
        return recipe.with_arch(_typed(model.architecture, model.architecture, ".".join((*PLACE, "model_type"))))
    assert model.path is not None
    return recipe.with_arch(read_architecture(model.path))


def read_architecture(directory: Path) -> Architecture:
    """The typed part of a Hugging Face `config.json`. Raises RecipeError naming the missing file or key."""
    values = read_model_config(directory)
    # transformers 5 writes `num_local_experts` and `rope_parameters`, the published files `num_experts`, `rope_theta`.
    values.setdefault("num_experts", values.get("num_local_experts"))
    rope = dict(values.get("rope_parameters") or {})
    if "rope_theta" in rope:
        values.setdefault("rope_theta", rope.pop("rope_theta"))
    if rope.get("rope_type", "default") != "default":
        values.setdefault("rope_scaling", rope)
    given = {name: value for name, value in values.items() if value is not None}
    cls = _class_of(given, "model.path")
    return _typed(given, {name: given[name] for name in cls.model_fields if name in given}, "model.path")


def _faults_of(texts: Mapping[str, Any]) -> tuple[Finding, ...]:
    """Findings about an architecture in a recipe that has other faults too."""
    section, faults = read_section({"architecture": texts}, ModelSection)
    if faults:  # `parse` has reported them
        return ()
    values = section["architecture"]
    try:
        _typed(values, values, ".".join((*PLACE, "model_type")))
    except RecipeError as error:
        return error.findings
    return ()


def _class_of(values: Mapping[str, Any], key: str) -> type[Architecture]:
    """The class of a model type. Raises RecipeError at `key` with the types that run."""
    name = values.get("model_type", DEFAULT_TYPE)
    if not isinstance(name, str) or name not in BY_TYPE:
        runs = "; ".join(f"{family.name}: {', '.join(family.architectures)}" for family in FAMILIES)
        raise refuse(
            "model-type-unknown", key, f"model_type={quote(name)} is no model that runs here", f"choose one of {runs}"
        )
    return BY_TYPE[name].architectures[name]


def _typed(config: Mapping[str, Any], keys: Mapping[str, Any], where: str) -> Architecture:
    """The typed architecture.

    Args:
        config: all that was given; keys that run with one value only are looked up here.
        keys: those that become fields.
        where: the key that names the model, for an error.
    """
    cls = _class_of(config, where)
    family = BY_TYPE[config.get("model_type", DEFAULT_TYPE)]
    found = [
        Finding(
            "model-key-differs", "error", ".".join((*PLACE, name)),
            f"{quote(config[name])}: models/{family.name} computes {name}={value} only",
            f"set {name}={value} if the weights allow it, or take another model",
        )
        for name, value in family.only_values.items()
        if name in config and config[name] is not None and config[name] != value
    ]  # fmt: skip
    try:
        fields = {name: value for name, value in keys.items() if name not in family.only_values}
        arch = validate({"model_type": DEFAULT_TYPE, **fields}, cls, PLACE)
    except RecipeError as error:
        raise RecipeError([*found, *error.findings]) from None
    if found:
        raise RecipeError(found)
    return arch
