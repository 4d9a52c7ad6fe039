"""The sample store: one small binary file a sample, written once, memory-mapped by every reader.

File layout, little-endian: a 32-byte header (magic `GSPO`, format version, prompt length, answer length, CRC-32 of
the body, shape of the routes, 4 zero bytes), then int32 ids of prompt and answer, then float32 log-probs of the answer,
then, where the sampler reported them, int16 routes. All start at a multiple of 4, so each can be viewed in place.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from gspo_megatron.types import Prompt, Response, SampleRef

MAGIC = b"GSPO"
FORMAT_VERSION = 1
HEADER = struct.Struct("<4sIIIIIHH4x")


INDEX = "steps.jsonl"
"""File of the store: one line a step, with the references of the samples that it trained on."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of the index."""

    step: int
    samples: tuple[SampleRef, ...]


class DamagedSample(ValueError):
    """A sample file that is not what was written; the message names the file and the fault."""


class SampleStore:
    """Samples of a run under one directory, on a file system that all roles see."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def write(self, prompt: Prompt, answer: Response, reward: float) -> SampleRef:
        """Store one finished response; the file appears under its name only when it is complete."""
        first, last = (answer.segments[0].version, answer.segments[-1].version) if answer.segments else (0, 0)
        name = f"{answer.prompt_index:08d}-{answer.sample_index:04d}-v{first}-{last}.sample"
        ids = np.concatenate([np.asarray(prompt.token_ids, np.int32), np.asarray(answer.token_ids, np.int32)])
        routes = np.zeros((0, 0, 0), "<i2") if answer.routes is None else np.asarray(answer.routes, "<i2")
        body = ids.astype("<i4").tobytes() + np.asarray(answer.logprobs, "<f4").tobytes() + routes.tobytes()
        if len(answer.logprobs) != len(answer.token_ids):
            raise ValueError(f"{name}: {len(answer.logprobs)} log-probs for {len(answer.token_ids)} tokens")
        lengths = (len(prompt.token_ids), len(answer.token_ids))
        header = HEADER.pack(MAGIC, FORMAT_VERSION, *lengths, _checksum(body, routes.shape), *routes.shape)
        temporary = self.directory / f".{name}.{os.getpid()}"
        temporary.write_bytes(header + body)
        temporary.rename(self.directory / name)
        return SampleRef(
            path=name,
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

    def record_step(self, step: int, refs: Sequence[SampleRef]) -> None:
        """Append what a step trains on to the index, for `trained_answers.py`."""
        line = TypeAdapter(StepRecord).dump_json(StepRecord(step, tuple(refs)))
        with (self.directory / INDEX).open("ab") as file:
            file.write(line + b"\n")

    def beside(self, name: str) -> SampleStore:
        """Another store in the same run directory."""
        return SampleStore(self.directory.parent / name)

    def prune(self, prefix: str, keep: int) -> None:
        """Remove the stores beside this one that have this prefix, all but the last `keep`."""
        for old in sorted(self.directory.parent.glob(f"{prefix}*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    def remove(self, ref: SampleRef) -> None:
        """Remove a sample that is not trained on."""
        (self.directory / ref.path).unlink(missing_ok=True)

    def holds(self, ref: SampleRef) -> bool:
        """Whether the file of a sample exists."""
        return (self.directory / ref.path).is_file()

    def sweep(self, keeps: Callable[[int, str], bool]) -> None:
        """Remove every sample for which `keeps`(index of its prompt, file name) is False."""
        for file in self.directory.glob("*.sample"):
            if not keeps(int(file.name.split("-")[0]), file.name):
                file.unlink()

    def read(self, ref: SampleRef) -> tuple[np.ndarray, int, np.ndarray]:
        """Map one sample.

        Returns:
            token_ids [prompt_length + answer_length] int32, index of the first answer token, and the sampler's
            log-probs [answer_length] float32; both arrays read-only.

        Raises:
            DamagedSample: missing, cut, changed or belonging to other metadata.
        """
        body, prompt_length, length, _ = self._map(ref)
        answer_end = 8 * length - 4 * prompt_length
        return body[: 4 * length].view("<i4"), prompt_length, body[4 * length : answer_end].view("<f4")

    def read_routes(self, ref: SampleRef) -> np.ndarray | None:
        """The sampler's experts, [length, layers, k] int16; -1 where it reported none, None where it reported nothing.

        Raises:
            DamagedSample: as `read`.
        """
        body, prompt_length, length, shape = self._map(ref)
        if not shape[0]:
            return None
        routes = np.full((length, *shape[1:]), -1, np.int16)
        routes[: shape[0]] = body[8 * length - 4 * prompt_length :].view("<i2").reshape(shape)
        return routes

    def _map(self, ref: SampleRef) -> tuple[np.ndarray, int, int, tuple[int, int, int]]:
        """The checked body of a file, the length of its prompt and of all of it, and the shape of its routes."""
        file = self.directory / ref.path
        if not file.is_file():
            raise DamagedSample(f"sample {file} does not exist; the step it belongs to cannot be replayed")
        size = file.stat().st_size
        if size < HEADER.size:
            raise DamagedSample(f"sample {file} has {size} bytes, fewer than its header; remove it")
        body = np.memmap(file, np.uint8, mode="r", offset=HEADER.size) if size > HEADER.size else np.empty(0, np.uint8)
        with file.open("rb") as opened:
            fields = HEADER.unpack(opened.read(HEADER.size))
        magic, version, prompt_length, answer_length, checksum, *shape = fields
        if magic != MAGIC or version != FORMAT_VERSION:
            raise DamagedSample(f"sample {file} is not a sample of format {FORMAT_VERSION}; remove it")
        if (prompt_length, answer_length) != (ref.prompt_length, ref.answer_length):
            raise DamagedSample(
                f"sample {file} holds {prompt_length} + {answer_length} tokens, its metadata says "
                f"{ref.prompt_length} + {ref.answer_length}; remove it"
            )
        length = prompt_length + answer_length
        rows, layers, chosen = shape
        size = 4 * (length + answer_length) + 2 * rows * layers * chosen
        if len(body) != size or rows > length or _checksum(body, (rows, layers, chosen)) != checksum:
            raise DamagedSample(f"sample {file} is damaged: its checksum does not fit its {len(body)} bytes; remove it")
        return body, prompt_length, length, (rows, layers, chosen)


def _checksum(body: bytes | np.ndarray, shape: tuple[int, ...]) -> int:
    """CRC-32 of the body and, where there are routes, of their shape."""
    checksum = zlib.crc32(body)
    return zlib.crc32(struct.pack("<III", *shape), checksum) if any(shape) else checksum
