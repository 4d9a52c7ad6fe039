"""The `gspo` command. Imports no torch before a run really starts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from gspo_megatron import __version__
from gspo_megatron.cluster.exit_codes import OK, REFUSED
from gspo_megatron.cluster.local_backend import plan_roles, run_roles
from gspo_megatron.cluster.machines import count_gpus
from gspo_megatron.config import Recipe, RecipeError, save_resolved
from gspo_megatron.config.loading import refuse
from gspo_megatron.models import load_recipe
from gspo_megatron.plan import check
from gspo_megatron.plan import command as plan_command
from gspo_megatron.plan.rules.not_built import not_built
from gspo_megatron.run_dir import RunDir


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command; the exit codes are those of cluster/exit_codes.py. A refusal is one finding a line."""
    parser = argparse.ArgumentParser(
        prog="gspo", description="Reinforcement learning of Mixture-of-Experts models with GSPO."
    )
    parser.add_argument("--version", action="version", version=f"gspo-megatron {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train_command = commands.add_parser("train", help="run a recipe on this machine")
    train_command.add_argument("recipe", type=Path, help="YAML recipe, e.g. recipes/tiny_moe.yaml")
    train_command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides: trainer.max_steps=10"
    )
    plan_command.add_arguments(commands)
    report_command = commands.add_parser("report", help="write the plots and report.html of a run directory")
    report_command.add_argument("run_dir", type=Path)
    convert_command = commands.add_parser("convert", help="checkpoint to Hugging Face directory, or back to a layout")
    convert_command.add_argument("source", type=Path, help="a checkpoint directory, or a Hugging Face directory")
    convert_command.add_argument("out", type=Path, help="directory to write; an older one is replaced")
    convert_command.add_argument("recipe", type=Path, nargs="?", help="recipe with the layout for such a directory")
    convert_command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the recipe")
    debug_command = commands.add_parser("debug", help="examine an update that a run kept under alarms/")
    debug_command.add_argument("bundle", type=Path, help="a failure dump: RUN_DIR/alarms/update_N")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "plan":
            return plan_command.run(chosen)
        if chosen.command == "debug":
            return debug(chosen.bundle)
        if chosen.command == "convert":
            return convert(chosen.source, chosen.out, chosen.recipe, chosen.overrides)
        return train(chosen.recipe, chosen.overrides) if chosen.command == "train" else report(chosen.run_dir)
    except RecipeError as error:
        for finding in error.findings:
            print(finding, file=sys.stderr)
        return REFUSED


def train(path: Path, overrides: Sequence[str]) -> int:
    """Run a recipe with all its roles on this machine."""
    recipe = load_recipe(path, overrides)
    gpus = count_gpus()
    ranks = recipe.trainer.ranks or gpus or 2
    findings = [*check(recipe, ranks), *not_built(recipe)]
    for finding in findings:
        print(finding, file=sys.stderr)
    if any(finding.severity == "error" for finding in findings):
        return REFUSED
    if recipe.run.directory is not None and RunDir(recipe.run.directory).done.is_file():
        print(f"{recipe.run.directory} holds a finished run (DONE); name another run.directory to start a new one")
        return OK
    run_dir = prepare_run(recipe)
    print(
        f"{recipe.run.name}: {ranks} trainer ranks, {recipe.rollout.servers} rollout server(s), all goes to {run_dir}",
        flush=True,
    )
    run = RunDir(run_dir)
    logs = run.attempt_logs(run.next_attempt()).path
    with refuse_unwritable(run_dir):
        logs.mkdir(parents=True)
    return run_roles(plan_roles(recipe, run_dir, ranks), logs)


def convert(source: Path, out: Path, recipe: Path | None, overrides: Sequence[str]) -> int:
    """Convert weights between a checkpoint and a Hugging Face directory."""
    wanted = load_recipe(recipe, overrides) if recipe else None
    from gspo_megatron import convert as conversion

    try:
        print(conversion.convert(source, out, wanted))
    except ValueError as fault:
        print(fault, file=sys.stderr)
        return REFUSED
    return OK


def debug(bundle: Path) -> int:
    """Compute the loss of a kept update again and print which tokens and sequences stand out."""
    from gspo_megatron.trainer.failure_replay import replay_bundle

    try:
        print(replay_bundle(bundle))
    except ValueError as fault:
        print(fault, file=sys.stderr)
        return REFUSED
    return OK


def report(run_dir: Path) -> int:
    """Write the plots and the page again from what a run recorded."""
    metrics = RunDir(run_dir).metrics
    if not metrics.is_file():
        print(f"{run_dir} holds no {metrics.name}; give the directory that `gspo train` printed", file=sys.stderr)
        return REFUSED
    from gspo_megatron.report.page import write_report
    from gspo_megatron.report.plots import write_plot

    write_plot(run_dir)
    print(write_report(run_dir))
    return OK


def prepare_run(recipe: Recipe) -> Path:
    """Make the run directory: resolved recipe, objective sentence, model description for the servers."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run = RunDir(recipe.run.directory or Path("runs") / f"{recipe.run.name}-{stamp}")
    with refuse_unwritable(run.path):
        run.model.mkdir(parents=True, exist_ok=True)
        save_resolved(recipe, run.recipe)
        batch = recipe.batch
        spec = recipe.objective.spec(recipe.rollout.max_answer_tokens)
        sentence = spec.describe(batch.prompts * batch.answers // batch.updates, batch.updates)
        run.objective.write_text(sentence + "\n")
        print(sentence, flush=True)
        arch = recipe.arch
        run.model_config.write_text(json.dumps(arch.to_hugging_face(recipe.model.dtype), indent=1))
    return run.path


@contextmanager
def refuse_unwritable(run_dir: Path) -> Iterator[None]:
    """Turn the system's refusal to write a run directory into one sentence. Raises RecipeError."""
    try:
        yield
    except OSError as error:
        raise refuse(
            "run-directory", "run.directory", f"{error.filename or run_dir} cannot be written ({error.strerror})",
            "name a directory that you can write, on a file system with room",
        ) from None  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
