"""The command `gspo eval`: servers and a controller on this machine, and no trainer."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from gspo_megatron.cluster.exit_codes import REFUSED
from gspo_megatron.cluster.local_backend import plan_evaluation, run_roles
from gspo_megatron.commands.evaluated_weights import EvaluatedWeights, find_weights, read_evaluation_recipe
from gspo_megatron.commands.recipe_arguments import add_recipe
from gspo_megatron.commands.train_run import is_refused
from gspo_megatron.config import Recipe, save_resolved
from gspo_megatron.config.loading import RecipeError, refuse
from gspo_megatron.config.recipe_paths import absolute_path, read_path, short_path
from gspo_megatron.models import weight_files
from gspo_megatron.own_directory import EVALUATION, claim_directory, hold_directory, refuse_unwritable
from gspo_megatron.plan import check_evaluation
from gspo_megatron.plan.command import parse_mixed
from gspo_megatron.plan.run_plan import read_contents
from gspo_megatron.run_dir import RunDir

OUT = "--out"


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `eval` command to the parser."""
    parser = subparsers.add_parser("eval", help="score the held-out problems of a recipe with any weights")
    kinds = "a Hugging Face directory, a checkpoint, or a run directory (its newest weights)"
    parser.add_argument("weights", metavar="MODEL", type=read_path, help=kinds)
    add_recipe(parser)
    parser.add_argument(OUT, type=read_path, metavar="DIR", help="new directory for answers and results")
    parser.parse_known_args = partial(parse_mixed, parser)  # type: ignore[method-assign]


def run(chosen: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    return evaluate(chosen.weights, chosen.recipe, chosen.overrides, chosen.out)


def evaluate(path: Path, recipe_path: Path, overrides: Sequence[str], out: Path | None = None) -> int:
    """Sample and score `evaluation.answers` responses to each of `evaluation.problems` held-out problems.

    Args:
        path: weights: a Hugging Face directory, a checkpoint, or a run directory.
        recipe_path: what is sampled, how, and how it is scored.
        overrides: `section.key=value`.
        out: missing or empty, or of an evaluation that was cut; None = under `runs/`.
    """
    weights = find_weights(path)
    for sentence in weights.passed_over:
        print(sentence, file=sys.stderr)
    recipe = read_evaluation_recipe(recipe_path, overrides, weights)
    if is_refused(check_evaluation(recipe)) or is_refused(read_contents(recipe, runs_here=True)):
        return REFUSED
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run = RunDir(absolute_path(out or f"runs/{recipe.run.name}-eval-{stamp}"))
    print(f"evaluates {short_path(weights.path)}; all goes to {short_path(run.path)}", flush=True)
    with contextlib.ExitStack() as held:
        prepare(run, recipe, weights, held)
        logs = run.attempt_logs(run.next_attempt()).path
        with refuse_unwritable(run.path, OUT):
            logs.mkdir(parents=True)
        return run_roles(plan_evaluation(recipe, run.path), logs, leader="evaluator")


def prepare(run: RunDir, recipe: Recipe, weights: EvaluatedWeights, held: contextlib.ExitStack) -> None:
    """Make the directory of an evaluation, with the weights where the servers look for them.

    Args:
        held: keeps the directory from others until it is closed.

    Raises:
        RecipeError: the directory is not ours, is in use, holds results, or cannot be written; the checkpoint cannot
            be read.
    """
    is_new = not run.path.exists()
    claim_directory(run.path, EVALUATION, OUT)
    held.enter_context(hold_directory(run.path, OUT))
    if run.evaluation.is_file():
        raise refuse("eval-finished", OUT, f"{run.path} holds a finished evaluation", "name a new directory")
    try:
        with refuse_unwritable(run.path, OUT):
            _lay_out(run, recipe, weights)
    except RecipeError:
        if is_new:
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def _lay_out(run: RunDir, recipe: Recipe, weights: EvaluatedWeights) -> None:
    shutil.rmtree(run.model, ignore_errors=True)  # of an attempt that was cut
    if weights.is_checkpoint:
        _convert(weights.path, recipe, run.model)
    else:
        run.model.mkdir()
        places = weight_files.find_weights(weights.path, recipe.arch).places
        for file in [*sorted(set(places.values())), weights.path / weight_files.INDEX_FILE]:
            if file.is_file():
                (run.model / file.name).symlink_to(file.absolute())
        # The servers compute with the model as the recipe has it, as in a run.
        run.model_config.write_text(json.dumps(recipe.arch.to_hugging_face(recipe.model.dtype), indent=1))
    run.weights_source.write_text(f"{weights.path.absolute()}\n")
    save_resolved(recipe, run.recipe)


def _convert(checkpoint: Path, recipe: Recipe, out: Path) -> None:
    """Write a checkpoint's weights under their Hugging Face names. Raises RecipeError for one that cannot be read."""
    from gspo_megatron.convert import to_hugging_face

    try:
        to_hugging_face(checkpoint, recipe, out)
    except RecipeError:
        raise
    except ValueError as error:
        message, _, fix = str(error).partition("; ")
        raise refuse("eval-checkpoint", "MODEL", message, fix or "name another checkpoint") from None
