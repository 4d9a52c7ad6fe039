"""What `gspo eval` evaluates: the weights behind a path, and the recipe with their model in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.attempts import find_checkpoint
from gspo_megatron.config.loading import read_tree, refuse
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models import load_resolved, parse_recipe
from gspo_megatron.run_dir import CheckpointDir, RunDir

TOKENIZER_FILE = "tokenizer_config.json"
"""Its presence says that a model directory holds a tokenizer."""
OF_THE_WEIGHTS = ("path", "architecture")
"""Keys of `model` that the weights decide."""


@dataclass(frozen=True, slots=True)
class EvaluatedWeights:
    """Weights on a disk."""

    path: Path
    """A Hugging Face directory or a checkpoint."""
    is_checkpoint: bool
    passed_over: tuple[str, ...] = ()
    """Sentences about newer checkpoints that cannot be read."""


def find_weights(path: Path) -> EvaluatedWeights:
    """Find the weights behind a Hugging Face directory, a checkpoint, or a run directory, of which the newest count.

    Raises:
        RecipeError: it is none of them, or a run without weights yet.
    """
    run = RunDir(path)
    if CheckpointDir(path).state.is_file():
        return EvaluatedWeights(path, is_checkpoint=True)
    if run.recipe.is_file():
        if run.done.is_file() and (run.final / "config.json").is_file():
            return EvaluatedWeights(run.final, is_checkpoint=False)
        found, faults = find_checkpoint(run.checkpoints)
        passed_over = tuple(f"{checkpoint.name} is passed over: {fault}" for checkpoint, fault in faults.items())
        if found is None:
            raise refuse(
                "eval-no-weights", "MODEL",
                "; ".join((f"{path} is a run directory without a checkpoint that can be read", *passed_over)),
                "wait for the first one (checkpoint.every), or name a model directory",
            )  # fmt: skip
        return EvaluatedWeights(found, True, passed_over)
    if not (path / "config.json").is_file():
        raise refuse(
            "eval-no-weights", "MODEL", f"{path} holds no config.json, state.json or recipe.resolved.yaml",
            "name a Hugging Face directory, a checkpoint (checkpoints/step_N), or a run directory",
        )  # fmt: skip
    return EvaluatedWeights(path, is_checkpoint=False)


def read_evaluation_recipe(path: Path, overrides: Sequence[str], weights: EvaluatedWeights) -> Recipe:
    """Read a recipe with the model of the weights instead of its own.

    The tokenizer is that of the recipe, or else the one beside the weights, or else the one of the recipe's own model.

    Raises:
        RecipeError: a recipe that cannot be read; an override of what the weights decide.
    """
    for item in overrides:
        key = item.partition("=")[0].strip()
        if any(key == f"model.{name}" or key.startswith(f"model.{name}.") for name in OF_THE_WEIGHTS):
            raise refuse("eval-model-key", key, f"the weights of {weights.path} decide it", "remove this override")
    tree = read_tree(path, overrides)
    tree.pop("cold_start", None)  # it makes weights, and these are there
    model, tokenizer = tree.get("model") or {}, tree.get("tokenizer") or {}
    # Anything else is no section, and the schema says so.
    if isinstance(model, dict) and isinstance(tokenizer, dict):
        tree["model"] = {name: value for name, value in model.items() if name not in OF_THE_WEIGHTS}
        tree["model"] |= _model_of(weights)
        own = model.get("path")
        if tokenizer.get("path") is None and own is not None and not (weights.path / TOKENIZER_FILE).is_file():
            tree["tokenizer"] = {**tokenizer, "path": own}
    return parse_recipe(tree)


def _model_of(weights: EvaluatedWeights) -> dict[str, Any]:
    if not weights.is_checkpoint:
        return {"path": str(weights.path.absolute())}
    return {"architecture": load_resolved(CheckpointDir(weights.path).recipe).arch.model_dump(mode="json")}
