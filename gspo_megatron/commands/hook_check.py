"""The command `gspo check`: tests a user's own object against the contract of its hook."""

from __future__ import annotations

import argparse
import sys

from gspo_megatron.cluster.exit_codes import OK, REFUSED
from gspo_megatron.config.hooks import HOOKS, recognise_hook
from gspo_megatron.config.plugins import load_object


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `check` command to the parser."""
    parser = subparsers.add_parser(
        "check", help="test a reward, objective or metric sink of your own with sample inputs"
    )
    parser.add_argument("reference", help="file.py:NAME or package.module:NAME")
    parser.add_argument("--hook", choices=HOOKS, help="what it is; without it, its parameters or members decide")


def run(chosen: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    return check_object(chosen.reference, chosen.hook)


def check_object(reference: str, name: str | None = None) -> int:
    """Check one object and print what was checked, or one sentence a fault.

    Args:
        reference: `file.py:NAME`, relative to the working directory, or `package.module:NAME`.
        name: name of the hook; None = recognised from the object.
    """
    try:
        found = load_object(reference)
        hook = HOOKS[name] if name else recognise_hook(found)
        checked = list(load_object(hook.contract)(found))
        if hook.trial:
            checked += load_object(hook.trial)(found)
    except ValueError as faults:
        for fault in str(faults).splitlines():
            print(f"{reference}: {fault}", file=sys.stderr)
        return REFUSED
    print(f"{reference} fits the hook {hook.name}: set {hook.key}={reference}")
    for sentence in checked:
        print(f"  {sentence}")
    return OK
