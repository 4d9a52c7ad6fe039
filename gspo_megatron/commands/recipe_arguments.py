"""The arguments that every command with a recipe takes."""

from __future__ import annotations

import argparse

from gspo_megatron.config.recipe_paths import read_path


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add `recipe` (a path) and `overrides` (a list of `key=value`) to the parser of a command."""
    parser.add_argument("recipe", type=read_path, help="YAML recipe, e.g. recipes/tiny_moe.yaml")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `overrides` alone, to a command whose recipe may be left out."""
    # Without a default argparse names the overrides where only the recipe is missing.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="dotted overrides: trainer.max_steps=10"
    )
