"""Rules of the problems and the tokenizer: what the recipe says of them, and what their files hold where they are here.

`data/prompt_check.py` reads the files. It lies above this part, so it is named by text, as the contract of a hook is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gspo_megatron.config.hooks import is_reference, load_hook
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.plugins import load_object
from gspo_megatron.config.schema import Recipe
from gspo_megatron.plan.rules.resume import begins_anew
from gspo_megatron.types import Finding

READER = "gspo_megatron.data.prompt_check"
CONTENT_WARNINGS = frozenset(
    {
        "prompts-left-out", "prompts-alike", "turn-end-not-a-stop", "golds-that-fail", "golds-are-solutions",
        "demonstrations-too-long", "demonstrations-held-out", "message-left-out", "tools-missing",
    }
)  # fmt: skip
"""Codes of the warnings of `read_findings`: a recipe may acknowledge them, and only reading shows whether it has to."""


def findings(recipe: Recipe, runs_here: bool) -> Iterator[Finding]:
    """Check what can be said without opening a file.

    Args:
        recipe: names the files.
        runs_here: whether the run starts from this machine, where they then must be.
    """
    data, tokenizer = recipe.data, recipe.tokenizer
    for hook, name in (("source", data.source), ("rendering", tokenizer.rendering)):
        if name is not None and is_reference(name):
            try:
                load_hook(hook, name)
            except RecipeError as error:
                yield from error.findings
    if data.source == "reasoning_gym" and not runs_here:
        fix = "`gspo data RECIPE` makes them now"
        yield Finding("problems-not-made", "info", "data.task", "problems are made and checked as a run starts", fix)
    for key, path, what in (
        ("data.path", data.path, "its problems are"),
        ("data.held_out_path", data.held_out_path, "its problems are"),
        ("tokenizer.path", tokenizer.path, "prompts are"),
        ("cold_start.path", recipe.cold_start.path if recipe.cold_start else None, "its demonstrations are"),
    ):
        # A run that goes on does not read the demonstrations again.
        is_read = key != "cold_start.path" or begins_anew(recipe)
        if path is not None and not os.path.exists(path) and is_read:
            yield _absent(key, path, what, runs_here)
    if tokenizer.path is None and recipe.model.path is None:
        message = "is not set and there is no model.path to take it from"
        yield Finding("tokenizer-missing", "error", "tokenizer.path", message, "set one of them")
    if data.held_out_is_training:
        yield Finding(
            "held-out-is-training", "error", "data.held_out_path",
            f"{data.held_out_path} is data.path: every problem would be held out and none trained on",
            "name another file, or remove it: data.held_out then splits data.path",
        )  # fmt: skip
    wanted = recipe.evaluation.problems or 0
    if data.held_out_path is None and wanted > data.held_out:
        yield Finding(
            "held-out-too-few", "error", "evaluation.problems",
            f"{wanted} problems are set, but data.held_out={data.held_out} are held out",
            "set it lower, to null (all), or hold out more (data.held_out)",
        )  # fmt: skip


def _absent(key: str, path: Path, what: str, runs_here: bool) -> Finding:
    if runs_here:
        return Finding("file-missing", "error", key, f"{path} does not exist here", "correct the path")
    fix = "nothing to do if it is there where the run starts"
    return Finding("file-not-here", "info", key, f"{path} is not found here: {what} not checked", fix)


def read_findings(recipe: Recipe, runs_here: bool) -> list[Finding]:
    """Read the files that are here as the run will: problems, tokenizer, prompts, held-out set.

    Args:
        recipe: names them.
        runs_here: whether the run starts from this machine. Generated problems are made only then: their library takes
            longer to load than a plan may.
    """
    generates = recipe.data.source != "file" and runs_here
    directory = recipe.tokenizer.path or recipe.model.path
    loads = recipe.tokenizer.kind == "huggingface" and directory is not None and os.path.exists(directory)
    if not (generates or loads):
        return load_object(f"{READER}:check_prompts")(recipe, runs_here)
    return _read_apart(recipe, runs_here)


def _read_apart(recipe: Recipe, runs_here: bool) -> list[Finding]:
    """Read them in a process of its own: what the libraries leave behind must not stay in this one."""
    # It finds what this process finds, a user's modules included.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", READER, *(["--runs-here"] if runs_here else [])],
        input=json.dumps(recipe.model_dump(mode="json")),
        capture_output=True, text=True, env=environment, encoding="utf-8",
    )  # fmt: skip
    if done.returncode == 0:
        return [Finding(**found) for found in json.loads(done.stdout.splitlines()[-1])]
    said = done.stderr.strip().splitlines()
    message = f"they could not be read: the process that tried ended with code {done.returncode}"
    message += f" ({said[-1]})" if said else ""
    return [Finding("prompts-unreadable", "error", "data", message, "correct what it names")]
