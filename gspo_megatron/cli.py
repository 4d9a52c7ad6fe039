"""The `gspo` command. Imports no torch before a run really starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from gspo_megatron import __version__
from gspo_megatron.cluster.exit_codes import REFUSED
from gspo_megatron.commands import (
    answer_list,
    conversion,
    evaluation_run,
    failure_debug,
    hook_check,
    prompt_report,
    run_compare,
    run_report,
    run_watch,
    train_run,
)
from gspo_megatron.config import RecipeError
from gspo_megatron.plan import command as plan_command

COMMANDS: dict[str, ModuleType] = {
    "train": train_run,
    "plan": plan_command,
    "eval": evaluation_run,
    "answers": answer_list,
    "watch": run_watch,
    "report": run_report,
    "compare": run_compare,
    "convert": conversion,
    "debug": failure_debug,
    "check": hook_check,
    "data": prompt_report,
}
"""Subcommand -> module with `add_arguments(subparsers)` and `run(arguments) -> exit code`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command; the exit codes are those of cluster/exit_codes.py. A refusal is one finding a line."""
    parser = argparse.ArgumentParser(
        prog="gspo", description="Reinforcement learning of Mixture-of-Experts models with GSPO."
    )
    parser.add_argument("--version", action="version", version=f"gspo-megatron {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS.values():
        module.add_arguments(subparsers)
    chosen = parser.parse_args(arguments)
    try:
        return COMMANDS[chosen.command].run(chosen)
    except RecipeError as error:
        for finding in error.findings:
            print(finding, file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main())
