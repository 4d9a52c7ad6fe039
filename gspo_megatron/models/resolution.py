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
from gspo_megatron.models.config_reader import PLACE, read_keys
from gspo_megatron.models.registry import BY_TYPE, DEFAULT_TYPE, FAMILIES
from gspo_megatron.types import Finding


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
        return recipe.with_arch(_typed(model.architecture))
    assert model.path is not None
    return recipe.with_arch(read_architecture(model.path))


def read_architecture(directory: Path) -> Architecture:
    """The model of a Hugging Face `config.json`. Raises RecipeError naming the missing file or every faulty key."""
    arch, findings = _read_file(directory)
    if arch is None:
        raise RecipeError([finding for finding in findings if finding.severity == "error"])
    return arch


def config_findings(directory: Path) -> list[Finding]:
    """What is to be said of a Hugging Face `config.json`: why it cannot be trained, and keys that nobody reads.

    Raises RecipeError if there is none that can be read.
    """
    return _read_file(directory)[1]


def _read_file(directory: Path) -> tuple[Architecture | None, list[Finding]]:
    values = read_model_config(directory)
    if "model_type" not in values:
        message = f"{directory / 'config.json'} has no model_type, by which the model is known"
        raise refuse("model-type-unknown", "model.path", message, "add it, as in the published config.json")
    return _check(values, "model.path", from_file=True)


def _faults_of(texts: Mapping[str, Any]) -> tuple[Finding, ...]:
    """Findings about an architecture in a recipe that has other faults too."""
    section, faults = read_section({"architecture": texts}, ModelSection)
    if faults:  # `parse` has reported them
        return ()
    try:
        _typed(section["architecture"])
    except RecipeError as error:
        return error.findings
    return ()


def _typed(texts: Mapping[str, Any]) -> Architecture:
    """The architecture that a recipe writes down."""
    where = ".".join((*PLACE, "model_type"))
    texts = {"model_type": DEFAULT_TYPE, **texts}
    values, faults = read_section(texts, _class_of(texts, where), PLACE)
    if faults:
        raise RecipeError(faults)
    arch, findings = _check(values, where, from_file=False)
    if arch is None:
        raise RecipeError(findings)
    return arch


def _class_of(values: Mapping[str, Any], key: str) -> type[Architecture]:
    """The class of a model type. Raises RecipeError at `key` with the types that run."""
    name = values["model_type"]
    if not isinstance(name, str) or name not in BY_TYPE:
        runs = "; ".join(f"{family.name}: {', '.join(family.architectures)}" for family in FAMILIES)
        raise refuse(
            "model-type-unknown", key, f"model_type={quote(name)} is no model that runs here", f"choose one of {runs}"
        )
    return BY_TYPE[name].architectures[name]


def _check(values: Mapping[str, Any], where: str, from_file: bool) -> tuple[Architecture | None, list[Finding]]:
    """The architecture, or None where a finding is an error.

    Args:
        values: every key that was given.
        where: the key that names the model, for an error.
        from_file: whether the keys are those of a `config.json`.
    """
    cls = _class_of(values, where)
    fields, findings = read_keys(cls, BY_TYPE[values["model_type"]], values, from_file)
    named = {finding.key for finding in findings}
    try:
        arch = validate(fields, cls, PLACE)
    except RecipeError as error:
        return None, [*findings, *(finding for finding in error.findings if finding.key not in named)]
    return (None if any(finding.severity == "error" for finding in findings) else arch), findings
