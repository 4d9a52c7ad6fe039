"""What lies in the files that a recipe names: digests by which a resumed run sees that one was edited.

The problems have a fingerprint of their own (`data/stream.py`), and the weights lie in the checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.shared_files import read_shared
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.tokenizer_files import stop_file, tokenizer_files, tokenizer_folders
from gspo_megatron.run_dir import RunDir

TOKENIZER, MODEL, DEMONSTRATIONS = "tokenizer.path", "model.path", "cold_start.path"
WEIGHTS = "weights"
"""Part of MODEL: only a run without a checkpoint, or with a reference policy, reads them again."""
OWN_CODE = (
    "reward.name", "environment.name", "agent.program", "data.source", "tokenizer.rendering", "objective.preset",
    "objective.trust",
)  # fmt: skip
"""Keys that name an object in a file, and decide what is computed."""
HARMLESS = ("model_max_length", "name_or_path", "transformers_version")
"""Keys of a tokenizer's JSON files that change no token."""
SAMPLE_BYTES = 4096
"""Of the end of each file of weights: other weights of one model differ there, and all of them take minutes to read."""

Digests = Mapping[str, Mapping[str, str]]
"""Key of the recipe -> part, e.g. the name of a file -> digest."""


def write_digests(recipe: Recipe, run: RunDir) -> None:
    """Write the digests of a run that starts or goes on."""
    run.named_files.write_text(json.dumps(digest_files(recipe), indent=1, sort_keys=True))


def read_digests(run: RunDir) -> Digests:
    """The digests of the attempt before; empty where there is none, or a run of an earlier version."""
    try:
        found = json.loads(read_shared(run.named_files))
    except (OSError, ValueError):
        return {}
    return {key: parts for key, parts in found.items() if isinstance(parts, dict)} if isinstance(found, dict) else {}


def digest_files(recipe: Recipe) -> Digests:
    """Digests of everything on this machine that a recipe names by its place; what is not here has none."""
    model, tokenizer, found = recipe.model.path, recipe.tokenizer.path, dict[str, dict[str, str]]()
    if model is not None:
        config = json.dumps(recipe.arch.to_hugging_face(recipe.model.dtype), sort_keys=True).encode()
        weights = b"".join(_sample(file) for file in sorted(model.glob("*.safetensors")))
        found[MODEL] = {"config.json": _digest(config)} | ({WEIGHTS: _digest(weights)} if weights else {})
    if (place := tokenizer or model) is not None and (parts := _tokenizer_parts(place)):
        stops = sorted({stop for one in (tokenizer, model) if one is not None for stop in _stop_ids(stop_file(one))})
        found[TOKENIZER] = parts | {"stop ids": _digest(json.dumps(stops).encode())}
    demonstrations = recipe.cold_start.path if recipe.cold_start else None
    if demonstrations is not None and demonstrations.is_file():
        found[DEMONSTRATIONS] = {"demonstrations": _digest(demonstrations.read_bytes())}
    for key in OWN_CODE:
        section, name = key.split(".")
        file = _own_file(getattr(getattr(recipe, section), name, None))
        if file is not None and file.is_file():
            found[key] = {"code": _digest(file.read_bytes())}
    return found


def _own_file(reference: Any) -> Path | None:
    """The file of `file.py:NAME` or `package.module:NAME`; what it imports is not followed."""
    place = reference.rpartition(":")[0] if isinstance(reference, str) else ""
    if not place or place.endswith(".py"):
        return Path(place) if place else None
    try:
        spec = importlib.util.find_spec(place)
    # A parent package of the user's own may raise anything.
    except Exception:
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _tokenizer_parts(place: Path) -> dict[str, str]:
    if place.is_file():
        return {place.suffix or "file": _digest(place.read_bytes())}
    parts = {file.name: _digest(_content(file)) for file in tokenizer_files(place)}
    for folder in tokenizer_folders(place):
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        parts[folder.name] = _digest(b"".join(file.name.encode() + b"\0" + file.read_bytes() for file in files))
    return parts


def _content(file: Path) -> bytes:
    """The bytes of a file; of JSON what it says, however it is spaced."""
    text = file.read_bytes()
    if file.suffix != ".json":
        return text
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key not in HARMLESS}
    return json.dumps(values, sort_keys=True).encode()


def _sample(file: Path) -> bytes:
    """Name, size and last bytes of a file."""
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(0, size - SAMPLE_BYTES))
        return file.name.encode() + b"\0" + size.to_bytes(8, "big") + opened.read()


def _stop_ids(file: Path) -> list[int]:
    """The stop ids that a file names; the rest of it changes no token."""
    try:
        named = json.loads(file.read_bytes()).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    return [stop for stop in (named if isinstance(named, list) else [named]) if isinstance(stop, int)]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
