"""The arguments that every command with a recipe takes."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add `recipe` (a path) and `overrides` (a list of `key=value`) to the parser of a command."""
    parser.add_argument("recipe", type=Path, help="YAML recipe, e.g. recipes/tiny_moe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides: trainer.max_steps=10")
