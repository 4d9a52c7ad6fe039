"""The weights of a Hugging Face directory, by the headers of its safetensors files, held against the weight table.

Only headers are read, and the values of a head beside tied embeddings. What transformers reads is read: one file
before an index, and no tensor that it computes itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.hf_table import EMBEDDING, HEAD, hf_shapes

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READ_TYPES = ("F32", "BF16", "F16", "F64")
"""Types of a published tensor; a narrower one is a quantised file, and its scales would be dropped."""
COMPUTED = ".rotary_emb.inv_freq"
"""Ends the names of tensors that old files hold and that no library reads."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
LFS = b"version https://git-lfs"
PART_BYTES = 1 << 24
"""Bytes of a head that are compared at one time."""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Where the tensors of a directory are, and what is wrong with them."""

    places: Mapping[str, Path]
    """Tensor -> file."""
    faults: tuple[str, ...]
    """Sentences, each with the file, the tensor, and what was expected where that is another thing."""


def find_weights(directory: Path, arch: Architecture) -> WeightFiles:
    """Look for every tensor of a model in the safetensors files of a directory."""
    places, faults = _places(directory)
    shapes = hf_shapes(arch)
    # Published directories of tied models hold the head beside the embedding that it is.
    spare = {HEAD} if arch.tie_word_embeddings else set()
    for file in sorted(set(places.values())):
        expected = {name for name, place in places.items() if place == file}
        faults += _faults_of_file(file, expected, shapes, arch)
    if places or not faults:
        faults += [f"{name} is missing: no file holds it" for name in sorted(shapes.keys() - places.keys())]
    unknown = places.keys() - shapes.keys() - spare
    faults += [
        f"{name} in {places[name].name} is unknown: {arch.model_type} has no such tensor"
        for name in sorted(unknown)
        if not name.endswith(COMPUTED)
    ]
    return WeightFiles(places, tuple(faults))


def head_fault(places: Mapping[str, Path], arch: Architecture) -> str | None:
    """Why a file's head is not the embedding that it is tied to, or None. Reads both, part by part.

    transformers leaves them apart where they differ, and would compute another model than the trainer.
    """
    if not arch.tie_word_embeddings or not {HEAD, EMBEDDING} <= places.keys():
        return None
    kinds, parts = zip(*(_open_tensor(places[name], name) for name in (HEAD, EMBEDDING)), strict=True)
    if kinds[0] == kinds[1] and all(one == other for one, other in zip(*parts, strict=True)):
        return None
    return (
        f"{HEAD} in {places[HEAD].name} differs from {EMBEDDING}, and tie_word_embeddings=true makes them one tensor: "
        "set it to false in config.json, or remove the head"
    )


def _open_tensor(file: Path, name: str) -> tuple[tuple[Any, Any], Iterator[bytes]]:
    """(Type and shape, the bytes in parts) of a tensor; the library gives no bytes of bfloat16 without torch."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(size))[name]
    start, end = (8 + size + offset for offset in entry["data_offsets"])

    def parts() -> Iterator[bytes]:
        with file.open("rb") as opened:
            opened.seek(start)
            for at in range(start, end, PART_BYTES):
                yield opened.read(min(PART_BYTES, end - at))

    return (entry["dtype"], entry["shape"]), parts()


def _places(directory: Path) -> tuple[dict[str, Path], list[str]]:
    """Where each tensor is by the index, or by the header of the only file."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        try:
            with safe_open(single, "numpy") as handle:
                return dict.fromkeys(handle.keys(), single), []
        except (OSError, SafetensorError) as error:
            return {}, [_unreadable(single, error)]
    for file in (single, index):
        if file.is_symlink() and not file.exists():
            return {}, [_missing(file)]
    if not index.is_file():
        others = sorted(path.name for path in directory.glob("*") if path.suffix in WEIGHT_SUFFIXES)
        held = f"; it holds {', '.join(others[:3])}, which is not read: save the model by save_pretrained"
        return {}, [f"neither {INDEX_FILE} nor {SINGLE_FILE} is there{held if others else ''}"]
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise TypeError("weight_map does not lead from tensors to files")
        wrong = sorted({name for name in places.values() if Path(name).name != name})
        if wrong:
            raise ValueError(f"weight_map names {wrong[0]!r}, which is no file name")
    except KeyError as error:
        return {}, [f"{INDEX_FILE} has no {error.args[0]}, which says where each tensor is"]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return {}, [_unreadable(index, error)]
    return {tensor: directory / name for tensor, name in places.items()}, []


def _missing(file: Path) -> str:
    """That a file is not there; a directory that was copied without what its links lead to has many such."""
    if file.is_symlink():
        return f"{file.name} is a link to {file.readlink()}, which is not there: copy the files that the links lead to"
    return f"{file.name} is missing"


def _unreadable(file: Path, error: Exception) -> str:
    """Why a file cannot be read; a pointer of git-lfs is what most often stands in a file's place."""
    try:
        with file.open("rb") as opened:
            if opened.read(len(LFS)) == LFS:
                return f"{file.name} is a pointer of git-lfs and not the file: run git lfs pull in its directory"
    except OSError:
        pass
    if isinstance(error, OSError) and error.strerror:
        return f"{file.name} cannot be read ({error.strerror}): see that this user can read it"
    return f"{file.name} cannot be read ({' '.join(str(error).split())}): it is cut or broken, get it again"


def _faults_of_file(
    file: Path, expected: set[str], shapes: Mapping[str, tuple[int, ...]], arch: Architecture
) -> Iterator[str]:
    """What differs in one file from the tensors that are expected in it."""
    if not file.is_file():
        yield f"{_missing(file)}; {INDEX_FILE} has {len(expected)} tensors there, {min(expected)} among them"
        return
    try:
        with safe_open(file, "numpy") as handle:
            held = set(handle.keys())
            for name in sorted(expected - held):
                yield f"{name} is not in {file.name}, where {INDEX_FILE} has it"
            for name in sorted(expected & held & shapes.keys()):
                found = handle.get_slice(name)
                yield from _faults_of_tensor(file.name, name, tuple(found.get_shape()), found.get_dtype(), shapes, arch)
    except (OSError, SafetensorError) as error:
        yield _unreadable(file, error)


def _faults_of_tensor(
    file: str, name: str, shape: tuple[int, ...], dtype: str, shapes: Mapping[str, tuple[int, ...]], arch: Architecture
) -> Iterator[str]:
    if shape != shapes[name]:
        rows = f" (vocab_size={arch.vocab_size})" if name in (EMBEDDING, HEAD) and shape[:1] != shapes[name][:1] else ""
        yield f"{name} in {file} has shape {shape}, expected {shapes[name]}{rows}"
    if dtype not in READ_TYPES:
        yield f"{name} in {file} has type {dtype}, expected one of {', '.join(READ_TYPES)}"
