"""The command `gspo convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gspo_megatron.cluster.exit_codes import OK, REFUSED
from gspo_megatron.commands.recipe_arguments import add_overrides
from gspo_megatron.config.recipe_paths import read_path
from gspo_megatron.models import load_recipe


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `convert` command to the parser."""
    parser = subparsers.add_parser("convert", help="checkpoint to Hugging Face directory, or back to a layout")
    parser.add_argument("source", type=read_path, help="a checkpoint directory, or a Hugging Face directory")
    parser.add_argument(
        "out", type=read_path, help="directory to write: missing, empty, or an older conversion, which is replaced"
    )
    parser.add_argument("recipe", type=read_path, nargs="?", help="recipe with the layout for such a directory")
    add_overrides(parser)


def run(chosen: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    return convert(chosen.source, chosen.out, chosen.recipe, chosen.overrides)


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
