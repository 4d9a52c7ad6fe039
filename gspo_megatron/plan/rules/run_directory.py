"""Rules of `run.directory`: a run writes into a directory that is missing, empty, or its own."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.cluster.shared_files import retry_stale
from gspo_megatron.config.schema import Recipe
from gspo_megatron.own_directory import RUN, directory_fault
from gspo_megatron.run_dir import RunDir
from gspo_megatron.types import Finding

DIRECTORIES = frozenset(
    {
        "sinks", "tensorboard", "samples", "model", "tokenizer", "checkpoints", "final", "heartbeat", "alarms", "logs",
    }
)  # fmt: skip
"""Names of RunDir that are directories; the others are files."""
LINK = "latest"
"""A link for people; whatever else has its name stays."""


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
        return
    for name in (name for name, member in vars(RunDir).items() if isinstance(member, property) and name != LINK):
        place, wants_directory = getattr(RunDir(path), name), name in DIRECTORIES
        if retry_stale(place.exists) and retry_stale(place.is_dir) != wants_directory:
            kinds = ("a directory", "a file") if wants_directory else ("a file", "a directory")
            message = f"{place} is {kinds[1]}; a run keeps {kinds[0]} of that name"
            yield Finding("directory-not-ours", "error", "run.directory", message, "move it elsewhere")
