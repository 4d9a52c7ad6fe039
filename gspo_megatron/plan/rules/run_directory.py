"""Rules of `run.directory`: a run writes into a directory that is missing, empty, or its own."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.schema import Recipe
from gspo_megatron.own_directory import RUN, directory_fault
from gspo_megatron.types import Finding


def findings(recipe: Recipe) -> Iterator[Finding]:
    """Look at the directory, if there is one here."""
    path = recipe.run.directory
    if path is None:
        return
    try:
        fault = directory_fault(path, RUN)
    except OSError as error:
        fault = f"{path} cannot be read ({error.strerror})"
    if fault:
        fix = "name a directory that is missing or empty, or one that a run made"
        yield Finding("directory-not-ours", "error", "run.directory", fault, fix)
