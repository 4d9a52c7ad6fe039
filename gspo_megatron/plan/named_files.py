"""What lies in the files that a recipe names: a digest a key, by which a resumed run sees that one was edited.

The problems have a fingerprint of their own (`data/stream.py`), and the weights lie in the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.tokenizer_files import stop_file, tokenizer_files, tokenizer_folders
from gspo_megatron.run_dir import RunDir

TOKENIZER, MODEL, DEMONSTRATIONS = "tokenizer.path", "model.path", "cold_start.path"
SAMPLE_BYTES = 4096
"""Of the end of each file of weights: other weights of one model differ there, and all of them take minutes to read."""
OWN_CODE = (
    "reward.name", "environment.name", "agent.program", "tokenizer.rendering", "objective.preset", "objective.trust",
)  # fmt: skip
"""Keys that name an object in a file, and decide what is computed."""


def write_digests(recipe: Recipe, run: RunDir) -> None:
    """Write the digests of a run that starts or goes on."""
    run.named_files.write_text(json.dumps(dict(digest_files(recipe)), indent=1, sort_keys=True))


def read_digests(run: RunDir) -> dict[str, str]:
    """The digests of the attempt before; empty where there is none, or a run of an earlier version."""
    try:
        found = json.loads(run.named_files.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def digest_files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Key and digest of everything on this machine that a recipe names by its place; what is not here has none."""
    if recipe.model.path is not None:
        config = json.dumps(recipe.arch.to_hugging_face(recipe.model.dtype), sort_keys=True).encode()
        weights = sorted(recipe.model.path.glob("*.safetensors"))
        yield MODEL, _digest([config, *(part for file in weights for part in (file.name.encode(), _sample(file)))])
    demonstrations = recipe.cold_start.path if recipe.cold_start else None
    if demonstrations is not None and demonstrations.is_file():
        yield DEMONSTRATIONS, _digest([demonstrations.read_bytes()])
    places = [place for place in (recipe.tokenizer.path, recipe.model.path) if place is not None]
    if places and (files := _files_of_tokenizer(places[0])):
        parts = [part for file in files for part in (file.name.encode(), file.read_bytes())]
        yield TOKENIZER, _digest([*parts, *(_stop_ids(stop_file(place)) for place in places)])
    for key in OWN_CODE:
        section, name = key.split(".")
        reference: Any = getattr(getattr(recipe, section), name, None)
        file = Path(reference.rpartition(":")[0]) if isinstance(reference, str) and ":" in reference else None
        if file is not None and file.suffix == ".py" and file.is_file():
            yield key, _digest([file.read_bytes()])


def _files_of_tokenizer(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    folders = (sorted(file for file in folder.rglob("*") if file.is_file()) for folder in tokenizer_folders(place))
    return [*tokenizer_files(place), *(file for files in folders for file in files)]


def _sample(file: Path) -> bytes:
    """Size and last bytes of a file."""
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(0, size - SAMPLE_BYTES))
        return size.to_bytes(8, "big") + opened.read()


def _stop_ids(file: Path) -> bytes:
    """What a file says of stop ids; the rest of it changes no token."""
    try:
        return json.dumps(json.loads(file.read_bytes()).get("eos_token_id")).encode()
    except (OSError, ValueError, AttributeError):
        return b""


def _digest(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
