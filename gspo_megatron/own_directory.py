"""Directories that the package writes: a place is taken if it is missing, empty, or bears the mark of the same kind.

Whatever else is there belongs to somebody: nothing is written into it, over it or deleted. Every run directory, export
and conversion goes through `claim_directory` or `replace_directory`. What is replaced as a whole has the digest of each
file in its mark: a file of ours that somebody edited since is somebody's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.config.refusal import RecipeError, refuse
from gspo_megatron.directory_lock import MARK, take_lock

WHOLE = 1 << 26
"""Bytes of a file up to which its digest covers all of it: every config and tokenizer."""
BLOCKS, BLOCK = 16, 1 << 16
"""Blocks of a larger file, and their bytes: weights that were trained on, merged or quantised differ in each."""


@dataclass(frozen=True, slots=True)
class DirectoryKind:
    """A kind of directory that the package writes."""

    name: str
    """In the mark: `hugging-face`."""
    words: str
    """In sentences: `a Hugging Face directory that gspo wrote`."""
    needed: tuple[str, ...]
    """Files that one has which an earlier version wrote, without a mark."""
    others: str
    """Regular expression of the further names in such a directory."""


EVALUATION = DirectoryKind("evaluation", "a directory of gspo eval", ("recipe.resolved.yaml", "weights_source"), r".*")
RUN = DirectoryKind("run", "a run directory", ("recipe.resolved.yaml", "objective.txt"), r".*")
HUGGING_FACE = DirectoryKind(
    "hugging-face", "a Hugging Face directory that gspo wrote", ("config.json", "model.safetensors.index.json"),
    r"model-[0-9]{5}\.safetensors",
)  # fmt: skip
LAYOUT = DirectoryKind(
    "layout", "a directory of gspo convert", ("state.json", "recipe.resolved.yaml"), r"rank_[0-9]{5}\.safetensors"
)


def directory_fault(path: Path, kind: DirectoryKind) -> str | None:
    """Why a directory of this kind must not be written there, as half a sentence; None = it may.

    Raises:
        OSError: the place cannot be looked at.
    """
    if not os.path.lexists(path):
        above = next((place for place in path.parents if os.path.lexists(place)), None)
        return f"{path} lies in {above}, which is not a directory" if above and not above.is_dir() else None
    if not path.is_dir():
        return f"{path} is not a directory"
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return None
    found = _not_as_written(path, kind, names)
    if found is None:
        return f"{path} holds {_some(names)}, and nothing marks it as {kind.words}"
    foreign, edited = found
    faults = [f"also holds {_some(foreign)}"] * bool(foreign)
    faults += [f"{_some(edited)} {'were' if len(edited) > 1 else 'was'} edited since"] * bool(edited)
    return f"{path} is {kind.words}, but {', and '.join(faults)}" if faults else None


def claim_directory(path: Path, kind: DirectoryKind, key: str) -> None:
    """Make a directory to write into, and mark it.

    Args:
        path: may be missing, empty, or of this kind already.
        kind: of the directory.
        key: recipe key or argument that names the path.

    Raises:
        RecipeError: the place is not ours, or cannot be written.
    """
    with refuse_unwritable(path, key):
        refuse_foreign(path, kind, key)
        path.mkdir(parents=True, exist_ok=True)
        if not (path / MARK).is_file():
            _write_mark(path, {"kind": kind.name})


@contextlib.contextmanager
def hold_directory(path: Path, key: str) -> Iterator[None]:
    """Keep every other process that asks for it from writing a claimed directory meanwhile.

    The lock lies on the mark and ends with this process, however that ends.

    Args:
        path: a directory that `claim_directory` made.
        key: recipe key or argument that names the path.

    Raises:
        RecipeError: another process holds it.
    """
    with refuse_unwritable(path, key):
        try:
            lock = take_lock(path)
        except BlockingIOError:
            message = f"another process of gspo writes {path} now: two would mix their files"
            fix = "wait until it has ended, or press Ctrl-C there; or name another directory"
            raise refuse("directory-in-use", key, message, fix) from None
    with lock or contextlib.nullcontext():
        yield


@contextlib.contextmanager
def replace_directory(path: Path, kind: DirectoryKind, key: str) -> Iterator[Path]:
    """Give a directory to fill, which takes the place of `path` when the block ends without a fault.

    Args:
        path: may be missing, empty, or of this kind and as it was written. A link is followed.
        kind: of the directory.
        key: recipe key or argument that names the path.

    Raises:
        RecipeError: the place is not ours, or cannot be written.
    """
    target = Path(os.path.realpath(path))
    with refuse_unwritable(path, key):
        partial, old = (target.parent / f".{target.name}.{kind.name}.{end}" for end in ("partial", "old"))
        for place in (target, partial, old):
            refuse_foreign(place, kind, key)
        _remove(partial)
        partial.mkdir(parents=True)
        # Without names: all in it was written by us, also if the process is killed now.
        _write_mark(partial, {"kind": kind.name})
    try:
        yield partial
        with refuse_unwritable(path, key):
            files = {file.relative_to(partial).as_posix(): file for file in partial.rglob("*") if file.name != MARK}
            digests = {name: digest_file(file) for name, file in sorted(files.items()) if file.is_file()}
            _write_mark(partial, {"kind": kind.name, "names": sorted(files), "digests": digests})
            refuse_foreign(target, kind, key)
            _remove(old)
            if target.exists():
                target.rename(old)
            partial.rename(target)
            _remove(old)
    except OSError as error:
        if error.filename is None or Path(error.filename).is_relative_to(partial):
            raise _unwritable(path, key, error) from None
        raise  # of a file that was to be read
    finally:
        _remove(partial)


def refuse_foreign(path: Path, kind: DirectoryKind, key: str) -> None:
    """Raise RecipeError if a directory of this kind must not be written there."""
    fault = directory_fault(path, kind)
    if fault is not None:
        fix = "move it elsewhere, or name a directory that is missing or empty; nothing was changed"
        raise refuse("directory-not-ours", key, fault, fix)


@contextlib.contextmanager
def refuse_unwritable(path: Path, key: str) -> Iterator[None]:
    """Turn the system's refusal to write a directory into one sentence. Raises RecipeError."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, key, error) from None


def _unwritable(path: Path, key: str, error: OSError) -> RecipeError:
    place = "" if error.filename in (None, str(path)) else f"{error.filename}: "
    message = f"{path} cannot be written ({place}{error.strerror or error})"
    return refuse("cannot-write", key, message, "name a directory that you can write, on a file system with room")


def _not_as_written(path: Path, kind: DirectoryKind, names: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Names in a directory of this kind that we did not write, and ours that changed; None = it is of no such kind."""
    if MARK not in names:
        found = [name for name in names if name not in kind.needed and not re.fullmatch(kind.others, name)]
        return None if found or not {*kind.needed} <= {*names} else ([], [])
    try:
        mark = json.loads((path / MARK).read_text(encoding="utf-8"))
        marked, written = mark["kind"], mark.get("names")
        known = None if written is None else {MARK, *written}
        digests = None if mark.get("digests") is None else dict(mark["digests"])
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    if marked != kind.name:
        return None
    if known is None:
        return [], []
    present = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*"))}
    foreign = [name for name in present if name not in known]
    ours = {name: file for name, file in present.items() if name in known and name != MARK and not file.is_dir()}
    # An earlier version kept no digests.
    edited = [] if digests is None else [name for name, file in ours.items() if digests.get(name) != digest_file(file)]
    return foreign, edited


def digest_file(file: Path) -> str | None:
    """Return the SHA-256 of a file's size and content, of a large one's evenly spaced blocks; None = it is no file."""
    if not file.is_file():
        return None
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size}/".encode())
    with file.open("rb") as opened:
        if size <= WHOLE:
            digest.update(opened.read())
        else:
            for number in range(BLOCKS):
                opened.seek((size - BLOCK) * number // (BLOCKS - 1))
                digest.update(opened.read(BLOCK))
    return digest.hexdigest()


def _some(names: Sequence[str]) -> str:
    """At most three names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _write_mark(directory: Path, mark: dict[str, Any]) -> None:
    """Write the mark so that no reader, and no crash, sees half of it."""
    fresh = directory / f"{MARK}.{os.getpid()}"
    fresh.write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
    fresh.replace(directory / MARK)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
