"""Rules of a model's directory: its `config.json` and the headers of its weights, where it is on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models import config_findings, read_architecture
from gspo_megatron.models.weight_files import find_weights, head_fault
from gspo_megatron.types import Finding

SHOWN = 5
"""Most findings about the weights of one directory."""


def findings(recipe: Recipe, arch: Architecture, runs_here: bool) -> Iterator[Finding]:
    """Check the files of `model.path`, or say that there are none here to check.

    Args:
        recipe: names the directory.
        arch: what its config.json must say.
        runs_here: whether the run starts from this machine, where the directory then must be.
    """
    path = recipe.model.path
    if path is None:
        return
    if not path.is_dir():
        if runs_here:
            fix = "name a Hugging Face model directory"
            yield Finding("model-missing", "error", "model.path", f"{path} is no directory here", fix)
        else:
            fix = "nothing to do if it is there where the run starts"
            message = f"{path} is not found here: its files are not checked"
            yield Finding("model-not-here", "info", "model.path", message, fix)
        return
    found = list(_config(recipe, arch))
    yield from found
    if not any(finding.severity == "error" for finding in found):
        yield from _weights(recipe, arch)


def _config(recipe: Recipe, arch: Architecture) -> Iterator[Finding]:
    """Compare `model.architecture` with the config.json."""
    path = recipe.model.path
    assert path is not None
    if not (path / "config.json").is_file():
        return
    try:
        yield from config_findings(path)
        found = read_architecture(path)
    except RecipeError as error:
        yield from error.findings
        return
    for name in type(arch).model_fields:
        in_recipe, in_file = getattr(arch, name), getattr(found, name, None)
        if in_recipe != in_file and name != "initializer_range":
            yield Finding(
                "architecture-differs", "error", f"model.architecture.{name}",
                f"{in_recipe}, but {path / 'config.json'} has {in_file}",
                "remove model.architecture, or name the right directory",
            )  # fmt: skip


def _weights(recipe: Recipe, arch: Architecture) -> Iterator[Finding]:
    """Hold the headers of the weights against the weight table."""
    path = recipe.model.path
    assert path is not None
    weights = find_weights(path, arch)
    faults = list(weights.faults)
    if not faults and (fault := head_fault(weights.places, arch)):
        faults = [fault]
    more = f" (and {len(faults) - SHOWN} more faults)" if len(faults) > SHOWN else ""
    for fault in faults[:SHOWN]:
        yield Finding(
            "model-weights-differ", "error", "model.path", f"{path}: {fault}{more}",
            "get the files of this model again, or name the directory of another",
        )  # fmt: skip
