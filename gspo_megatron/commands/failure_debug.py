"""The command `gspo debug`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gspo_megatron.cluster.exit_codes import OK, REFUSED
from gspo_megatron.config.recipe_paths import read_path


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `debug` command to the parser."""
    parser = subparsers.add_parser("debug", help="examine an update that a run kept under alarms/")
    parser.add_argument("bundle", type=read_path, help="a failure dump: RUN_DIR/alarms/update_N")


def run(chosen: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    return debug(chosen.bundle)


def debug(bundle: Path) -> int:
    """Compute the loss of a kept update again and print which tokens and sequences stand out."""
    from gspo_megatron.trainer.failure_replay import replay_bundle

    try:
        print(replay_bundle(bundle))
    except ValueError as fault:
        print(fault, file=sys.stderr)
        return REFUSED
    return OK
