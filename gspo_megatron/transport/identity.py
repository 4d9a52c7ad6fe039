"""The run that a server belongs to and what it serves, compared with the run before anything is sampled or sent.

A server may be given by address, or be left over from something else: its process answers, its key may even fit.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.run_dir import RunDir
from gspo_megatron.transport.messages import ServerIdentity

RUN_VARIABLE = "GSPO_RUN_ID"
TOKENIZER_VARIABLE = "GSPO_TOKENIZER_HASH"
"""Set by `inference/server.py` in its own environment, which vLLM's workers inherit; they answer for the server."""
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
"""What decides ids in a Hugging Face directory; its chat template is read by the controller alone."""
UNUSED = {"initializer_range"}
"""Keys of the architecture that a model with weights does not depend on."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What every server of a run must be."""

    run: str
    """The run's id."""
    tokenizer: str
    """Hash of the vocabulary; empty = the recipe names no tokenizer."""
    architecture: Architecture
    """The model."""
    dtype: str
    """Of its weights: `bfloat16`."""
    context: int
    """Tokens of the longest prompt and answer together."""

    def fault_of(self, reported: ServerIdentity) -> str:
        """Why a server with this report is not one of the run's, or an empty text."""
        if reported.run != self.run:
            return (
                f"belongs to run {reported.run or 'nobody'}, this is run {self.run}; start it with the --run-dir of "
                "this run, or take it off the list of servers"
            )
        differing = [
            f"{name} is {theirs} there and {ours} in the recipe" for name, ours, theirs in self._differences(reported)
        ]
        if differing:
            return f"serves another model: {', '.join(differing[:3])}; start it again from this run's model directory"
        if reported.tokenizer != self.tokenizer:
            return (
                f"was started with another vocabulary: hash {reported.tokenizer or 'of none'} there and "
                f"{self.tokenizer or 'of none'} here; give both the tokenizer of this recipe"
            )
        if reported.context < self.context:
            return (
                f"takes {reported.context} tokens, prompt and answer of this recipe may have {self.context}, and it "
                "would cut them silently; start it again with this recipe, or lower rollout.max_answer_tokens"
            )
        return ""

    def _differences(self, reported: ServerIdentity) -> list[tuple[str, Any, Any]]:
        """Keys of the model in which a server differs, with our value and its."""
        config = json.loads(reported.config)
        rope = dict(config.get("rope_parameters") or {})
        config.setdefault("rope_theta", rope.get("rope_theta"))
        # The library fills in what a recipe leaves to it.
        named = self.architecture.rope_scaling or rope.keys() - {"rope_theta"}
        scales = rope.get("rope_type", "default") != "default"
        config["rope_scaling"] = {name: rope.get(name) for name in named} if scales else None
        ours = {**self.architecture.model_dump(exclude=UNUSED), "dtype": self.dtype}
        theirs = {**{name: config.get(name, ours[name]) for name in ours}, "dtype": reported.dtype}
        return [(name, ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]]


def identity_of(recipe: Recipe, run_dir: Path) -> Identity:
    """What the servers of this run must be."""
    model, rollout = recipe.model, recipe.rollout
    context = rollout.max_sequence_tokens
    return Identity(read_run_id(run_dir), hash_vocabulary(recipe), recipe.arch, model.dtype, context)


def read_run_id(run_dir: Path) -> str:
    """The id of the run in this directory; whichever role asks first makes it."""
    file = RunDir(run_dir).run_id
    mine = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    if not file.is_file():
        mine.write_text(secrets.token_hex(8))
        # A link, because it appears complete and fails where another role was first.
        with suppress(FileExistsError):
            os.link(mine, file)
        mine.unlink()
    return file.read_text()


def hash_vocabulary(recipe: Recipe) -> str:
    """16 hex digits over the files that turn text into ids; empty where the recipe names none."""
    path = recipe.tokenizer.path or recipe.model.path
    if path is None:
        return ""
    files = [path] if path.is_file() else [path / name for name in VOCABULARY_FILES if (path / name).is_file()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
