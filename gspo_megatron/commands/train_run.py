"""The command `gspo train`: all roles of a run on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from gspo_megatron.cluster.attempts import newest_checkpoint
from gspo_megatron.cluster.exit_codes import OK, REFUSED
from gspo_megatron.cluster.local_backend import plan_roles, run_roles
from gspo_megatron.cluster.machines import count_gpus
from gspo_megatron.cluster.shared_files import retry_stale
from gspo_megatron.commands.recipe_arguments import add_recipe
from gspo_megatron.commands.resume_command import extend_command, resume_command
from gspo_megatron.config import Recipe, save_resolved
from gspo_megatron.config.loading import refuse
from gspo_megatron.config.recipe_paths import absolute_path, short_path
from gspo_megatron.data.model_directory import keep_tokenizer
from gspo_megatron.models import load_recipe, load_resolved
from gspo_megatron.own_directory import (
    HUGGING_FACE,
    RUN,
    claim_directory,
    hold_directory,
    refuse_foreign,
    refuse_unwritable,
)
from gspo_megatron.plan import check
from gspo_megatron.plan.named_files import write_digests
from gspo_megatron.plan.run_plan import read_contents
from gspo_megatron.report.provenance import record_start
from gspo_megatron.run_dir import EXPORT, RunDir
from gspo_megatron.types import Finding

KEY = "run.directory"
"""Where a run writes."""


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `train` command to the parser."""
    add_recipe(subparsers.add_parser("train", help="run a recipe on this machine"))


def run(chosen: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    return train(chosen.recipe, chosen.overrides)


def train(path: Path, overrides: Sequence[str]) -> int:
    """Run a recipe with all its roles on this machine."""
    recipe = load_recipe(path, overrides)
    gpus = count_gpus()
    ranks = recipe.trainer.ranks or gpus or 2
    if is_refused(check(recipe, ranks)):
        return REFUSED
    if stays_finished(recipe):
        assert recipe.run.directory is not None
        further = extend_command(path, overrides, recipe.run.directory, recipe.trainer.max_steps)
        print(f"{recipe.run.directory} holds a finished run (DONE); to train further: {further}")
        return OK
    if is_refused(read_contents(recipe, runs_here=True)):
        return REFUSED
    run = RunDir(place_run(recipe))
    claim_directory(run.path, RUN, KEY)
    with hold_directory(run.path, KEY):
        prepare_run(recipe, run.path)
        print(
            f"{recipe.run.name}: {ranks} trainer ranks, {recipe.rollout.servers} rollout server(s), "
            f"all goes to {short_path(run.path)}",
            flush=True,
        )
        logs = run.attempt_logs(run.next_attempt()).path
        with refuse_unwritable(run.path, KEY):
            logs.mkdir(parents=True)
        resume = resume_command(path, overrides, run.path)
        extend = extend_command(path, overrides, run.path, recipe.trainer.max_steps)
        return run_roles(plan_roles(recipe, run.path, ranks), logs, resume=resume, extend=extend)


def stays_finished(recipe: Recipe) -> bool:
    """Whether the run in `run.directory` is finished and is not to have more steps; if it is, it goes on.

    Raises:
        RecipeError: it is to have more steps, and left no checkpoint to go on from.
    """
    if recipe.run.directory is None or not retry_stale(RunDir(recipe.run.directory).done.is_file):
        return False
    run, wanted = RunDir(recipe.run.directory), recipe.trainer.max_steps
    done = load_resolved(run.recipe).trainer.max_steps
    if wanted <= done:
        return True
    step = newest_checkpoint(run.path)
    if step == 0:
        raise refuse(
            "no-checkpoint", "trainer.max_steps",
            f"{wanted} extends the finished run of {done} steps in {run.path}, which holds no checkpoint to go on from",
            f"start another run with model.path={run.final}" if run.final.is_dir() else "start another run",
        )  # fmt: skip
    print(f"{run.path} holds a finished run of {done} steps; it goes on after step {step}, to step {wanted}")
    return False


def is_refused(findings: Sequence[Finding]) -> bool:
    """Print findings; whether one of them is an error."""
    for finding in findings:
        print(finding, file=sys.stderr)
    return any(finding.severity == "error" for finding in findings)


def claim_run(run_dir: Path) -> None:
    """Make a run directory and mark it; a run may go on in its own. Raises RecipeError for a place that is not ours."""
    claim_directory(run_dir, RUN, KEY)
    run = RunDir(run_dir)
    with refuse_unwritable(run_dir, KEY):
        # Written again by this run, which goes on from there: said now rather than then.
        done = newest_checkpoint(run_dir)
        exports = [place for step, place in EXPORT.find(run.checkpoints).items() if step > done]
        for export in (run.final, *exports):
            refuse_foreign(export, HUGGING_FACE, KEY)


def place_run(recipe: Recipe) -> Path:
    """Where a run that starts now writes."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return recipe.run.directory or absolute_path(f"runs/{recipe.run.name}-{stamp}")


def prepare_run(recipe: Recipe, place: Path | None = None) -> Path:
    """Make the run directory: resolved recipe, objective sentence, model description for the servers."""
    run = RunDir(place or place_run(recipe))
    claim_run(run.path)
    with refuse_unwritable(run.path, KEY):
        run.done.unlink(missing_ok=True)  # a finished run that is to have more steps
        record_start(run)
        run.model.mkdir(parents=True, exist_ok=True)
        save_resolved(recipe, run.recipe)
        batch = recipe.batch
        spec = recipe.objective.spec(recipe.rollout.max_answer_tokens)
        sentence = spec.describe(batch.prompts * batch.answers // batch.updates, batch.updates)
        run.objective.write_text(sentence + "\n")
        print(sentence, flush=True)
        arch = recipe.arch
        write_digests(recipe, run)
        keep_tokenizer(recipe, run.tokenizer)
        run.model_config.write_text(json.dumps(arch.to_hugging_face(recipe.model.dtype), indent=1))
    return run.path
