"""The sample store: a few append-only files a step, with an index that is written when the step is handed out.

    samples/written_000017.bin      records of the responses that finished since the file before it was closed
    samples/step_000012.jsonl       which of them step 12 trains on, with rewards and questions (sample_index.py)
    samples/trained_000012/         what its training passes said of them (log_ratios.py)

A record, little-endian: a 32-byte header (magic `GSPO`, format version, prompt length, answer length, CRC-32 of the
body, shape of the routes, bytes of one of their numbers, rows of log-probs, 2 zero bytes), then int32 ids of prompt and
answer, then float32 log-probs of the answer: the sampler's and, in a second row, the teacher's; then, where the sampler
reported them, routes. All start at a multiple of 4, so each is viewed in place. Earlier versions wrote 0 rows for one.

A reference names file and offset, and exists only after its record was written: what a killed process leaves half
written is never read. A new process opens a new file. Files are closed and on the disk before a batch or a checkpoint
refers to them, so another node that opens one sees all of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gspo_megatron.data.log_ratios import TRAINED
from gspo_megatron.data.sample_index import INDEX, StepGroup, read_refs, write_index
from gspo_megatron.run_dir import NumberedName
from gspo_megatron.types import ROUTE_TYPES, Prompt, Response, SampleRef

MAGIC = b"GSPO"
FORMAT_VERSION = 1
HEADER = struct.Struct("<4sIIIIIHHBB2x")
WRITTEN = NumberedName("written", 6, ".bin")
"""Files of records, in the order in which they were opened."""
AT = "@"
"""Between file and offset in a reference. Without it the file is one record, as earlier versions wrote it."""
MAPPED_FILES = 8
"""Files that a reader keeps mapped."""


class DamagedSample(ValueError):
    """A record that is not what was written; the message names its place and the fault."""


class _Record(NamedTuple):
    """One record, viewed in place."""

    ids: np.ndarray
    """[prompt_length + answer_length] int32."""
    prompt_length: int
    logprobs: np.ndarray
    """[1 or 2, answer_length] float32: the sampler's, the teacher's."""
    routes: np.ndarray
    """[rows, layers, k]; no rows where the sampler reported nothing."""


class SampleStore:
    """Samples of a run under one directory, on a file system that all roles see. Threads may share one."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file: int | None = None
        self._number = 0
        self._end = 0
        self._files_of: dict[int, set[str]] = {}

    def write(self, prompt: Prompt, answer: Response, reward: float) -> SampleRef:
        """Append one response; its reference exists only after the whole record does."""
        rows = [row for row in (answer.logprobs, answer.teacher_logprobs) if row is not None]
        for row in rows:
            if len(row) != len(answer.token_ids):
                raise ValueError(
                    f"prompt {answer.prompt_index}, sample {answer.sample_index}: {len(row)} log-probs for "
                    f"{len(answer.token_ids)} tokens"
                )
        ids = np.concatenate([np.asarray(prompt.token_ids, np.int32), np.asarray(answer.token_ids, np.int32)])
        routes = np.zeros((0, 0, 0), np.uint8) if answer.routes is None else answer.routes
        kind = np.dtype(ROUTE_TYPES[routes.dtype.itemsize])
        body = ids.astype("<i4").tobytes() + b"".join(np.asarray(row, "<f4").tobytes() for row in rows)
        body += routes.astype(kind, copy=False).tobytes()
        lengths = (len(prompt.token_ids), len(answer.token_ids))
        shape = (*routes.shape, kind.itemsize, len(rows))
        header = HEADER.pack(MAGIC, FORMAT_VERSION, *lengths, _checksum(body, routes.shape), *shape)
        return SampleRef(
            path=self._append(header + body),
            prompt_index=answer.prompt_index,
            sample_index=answer.sample_index,
            prompt_length=len(prompt.token_ids),
            answer_length=len(answer.token_ids),
            reward=reward,
            stop_reason=answer.stop_reason,
            segments=answer.segments,
            masked=answer.masked,
            limit=answer.limit,
        )

    def seal(self) -> int:
        """Bring all that was written to the disk and close its file; what comes next goes into a new one.

        Returns:
            Number of the last file; 0 before the first.
        """
        with self._lock:
            if self._file is not None:
                os.fsync(self._file)
                os.close(self._file)
                self._file = None
            return self._number

    def finish_step(
        self, step: int, groups: Sequence[StepGroup], in_flight: Iterable[SampleRef], keep: int | None
    ) -> None:
        """Write the index of a step, and remove what is kept no longer.

        Args:
            step: that the groups are handed out for. Indexes from it on are of an attempt that was lost.
            groups: of the step.
            in_flight: samples of groups that a later step may get.
            keep: steps whose samples stay, this one included; None = all.
        """
        newest = self.seal()
        write_index(self.directory, step, groups)
        self._files_of[step] = {_place(ref)[0] for _, refs in groups for ref in refs}
        found = INDEX.find(self.directory)
        kept = [number for number in found if number <= step][-(keep or len(found)) :]
        for number, file in found.items():
            if number not in kept:
                file.unlink(missing_ok=True)
                self._files_of.pop(number, None)
            elif number not in self._files_of:  # of an earlier attempt
                self._files_of[number] = {_place(ref)[0] for ref in read_refs(file)}
        for number, directory in TRAINED.find(self.directory).items():
            if number not in kept:
                shutil.rmtree(directory, ignore_errors=True)
        needed = {_place(ref)[0] for ref in in_flight}.union(*self._files_of.values())
        for number, file in WRITTEN.find(self.directory).items():
            # The newest may hold a response whose reference is still on its way to its group.
            if number < newest and file.name not in needed:
                file.unlink(missing_ok=True)

    def beside(self, name: str) -> SampleStore:
        """Another store in the same run directory."""
        return SampleStore(self.directory.parent / name)

    def prune(self, names: NumberedName, keep: int) -> None:
        """Remove the stores beside this one that have such names, all but the last `keep`."""
        for old in [*names.find(self.directory.parent).values()][:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    def holds(self, ref: SampleRef) -> bool:
        """Whether the record of a sample is there, whole."""
        try:
            self._map(ref)
        except DamagedSample:
            return False
        return True

    def read(self, ref: SampleRef) -> tuple[np.ndarray, int, np.ndarray]:
        """Map one sample.

        Returns:
            token_ids [prompt_length + answer_length] int32, index of the first answer token, and the sampler's
            log-probs [answer_length] float32; both arrays read-only.

        Raises:
            DamagedSample: missing, cut, changed or belonging to other metadata.
        """
        record = self._map(ref)
        return record.ids, record.prompt_length, record.logprobs[0]

    def read_teacher(self, ref: SampleRef) -> np.ndarray | None:
        """The teacher's log-probs, [answer_length] float32, read-only, 0 where masked; None where it was not asked.

        Raises:
            DamagedSample: as `read`.
        """
        logprobs = self._map(ref).logprobs
        return logprobs[1] if len(logprobs) > 1 else None

    def read_routes(self, ref: SampleRef) -> np.ndarray | None:
        """The sampler's experts of the first tokens, [rows, layers, k], read-only; None where it reported nothing.

        Raises:
            DamagedSample: as `read`.
        """
        routes = self._map(ref).routes
        return routes if len(routes) else None

    def _append(self, record: bytes) -> str:
        """Write a record behind the last whole one; returns its place."""
        with self._lock:
            if self._file is None:
                self._open()
            assert self._file is not None
            written = 0
            while written < len(record):  # after a fault the next record overwrites what there is of this one
                written += os.pwrite(self._file, memoryview(record)[written:], self._end + written)
            place = f"{WRITTEN.name(self._number)}{AT}{self._end}"
            self._end += -(-len(record) // 4) * 4
            return place

    def _open(self) -> None:
        """Begin a file that nobody has."""
        self._number = max(self._number, *WRITTEN.find(self.directory), 0)
        while self._file is None:
            self._number += 1
            with contextlib.suppress(FileExistsError):
                file = self.directory / WRITTEN.name(self._number)
                self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._end = 0

    def _map(self, ref: SampleRef) -> _Record:
        """A record, checked.

        Raises:
            DamagedSample: as `read`.
        """
        name, offset = _place(ref)
        file = self.directory / name
        try:
            size = file.stat().st_size
        except OSError:
            raise DamagedSample(f"sample {file} does not exist; the step it belongs to cannot be replayed") from None
        if size < offset + HEADER.size:
            raise DamagedSample(f"sample {file} ends at byte {size}, before the header of the record at {offset}")
        whole = _map_file(file, size)
        fields = HEADER.unpack(whole[offset : offset + HEADER.size].tobytes())
        magic, version, prompt_length, answer_length, checksum, *shape = fields
        if magic != MAGIC or version != FORMAT_VERSION:
            raise DamagedSample(f"sample {file} has no record of format {FORMAT_VERSION} at byte {offset}")
        if (prompt_length, answer_length) != (ref.prompt_length, ref.answer_length):
            raise DamagedSample(
                f"sample {file} at byte {offset} holds {prompt_length} + {answer_length} tokens, its metadata says "
                f"{ref.prompt_length} + {ref.answer_length}"
            )
        length = prompt_length + answer_length
        rows, layers, chosen, item_bytes, floats = shape
        floats = max(floats, 1)
        ids_end, routes_start = 4 * length, 4 * (length + floats * answer_length)
        wanted = routes_start + item_bytes * rows * layers * chosen
        body = whole[offset + HEADER.size : offset + HEADER.size + wanted]
        fits = len(body) == wanted and rows <= length and (not rows or item_bytes in ROUTE_TYPES)
        if not fits or _checksum(body, (rows, layers, chosen)) != checksum:
            raise DamagedSample(
                f"sample {file} is damaged: the checksum at byte {offset} does not fit the {len(body)} bytes behind it"
            )
        return _Record(
            body[:ids_end].view("<i4"),
            prompt_length,
            body[ids_end:routes_start].view("<f4").reshape(floats, answer_length),
            body[routes_start:].view(ROUTE_TYPES[item_bytes if rows else 1]).reshape(rows, layers, chosen),
        )


@lru_cache(maxsize=MAPPED_FILES)
def _map_file(file: Path, size: int) -> np.ndarray:
    """The first bytes of a file, which only grows; read-only."""
    return np.memmap(file, np.uint8, mode="r", shape=(size,))


def _place(ref: SampleRef) -> tuple[str, int]:
    """File and offset of a record."""
    name, _, offset = ref.path.partition(AT)
    if not name or Path(name).name != name or not (offset or "0").isdecimal():
        raise DamagedSample(f"{ref.path!r} is no place of a sample")
    return name, int(offset or 0)


def _checksum(body: bytes | np.ndarray, shape: tuple[int, ...]) -> int:
    """CRC-32 of the body and, where there are routes, of their shape."""
    checksum = zlib.crc32(body)
    return zlib.crc32(struct.pack("<III", *shape), checksum) if any(shape) else checksum
