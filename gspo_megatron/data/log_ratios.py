"""What the training passes of a step said of its responses, beside the samples: for people, not for training.

    samples/trained_000012/rank_00003.bin     the responses of step 12 that trainer rank 3 had in a pass

A file, little-endian: MAGIC, their number as uint32, a table of RECORD, then float16 log-ratios, one a response token.
It appears under its name when it is complete. A response that was left out of the passes is in no file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gspo_megatron.run_dir import NumberedName

TRAINED = NumberedName("trained", 6)
"""Directories in the sample store, by step."""
MAGIC = b"GSPOLR01"
RECORD = np.dtype(
    [("prompt", "<i8"), ("sample", "<i4"), ("length", "<u4"), ("offset", "<u8"), ("left", "<f4"), ("right", "<f4")]
)
BYTES = np.dtype("<f2").itemsize
"""Of one token."""


@dataclass(frozen=True, slots=True)
class TrainedResponse:
    """One response in its training pass."""

    prompt_index: int
    """`SampleRef.prompt_index`."""
    sample_index: int
    """`SampleRef.sample_index`."""
    left: float
    """Share of its trained tokens that lost their gradient on the left side of the band."""
    right: float
    """The same on the right side."""
    log_ratios: np.ndarray
    """[answer_length] log-prob in the training pass minus the sampler's, nats; 0 where nothing was trained."""


@dataclass(frozen=True, slots=True)
class StoredRatios:
    """Where the log-ratios of a response lie, and what was clipped."""

    left: float
    """As `TrainedResponse.left`."""
    right: float
    """As `TrainedResponse.right`."""
    length: int
    """Tokens of the response."""
    file: Path
    """That holds them."""
    offset: int
    """Of the first one, bytes."""

    def read(self) -> np.ndarray:
        """[length] float16.

        Raises:
            OSError: the file is gone.
            ValueError: it is cut.
        """
        found = np.fromfile(self.file, "<f2", self.length, offset=self.offset)
        if len(found) != self.length:
            raise ValueError(f"{self.file} ends before byte {self.offset + BYTES * self.length}")
        return found


def write_log_ratios(samples: Path, step: int, rank: int, responses: Iterable[TrainedResponse]) -> None:
    """Write the responses that one rank had in a pass.

    Args:
        samples: directory of the sample store.
        step: that trained on them.
        rank: of the trainer.
        responses: of all its mini-batches.
    """
    rows = list(responses)
    table = np.zeros(len(rows), RECORD)
    lengths = [len(row.log_ratios) for row in rows]
    begin = len(MAGIC) + 4 + table.nbytes
    for field in ("left", "right"):
        table[field] = [getattr(row, field) for row in rows]
    table["prompt"], table["sample"] = [row.prompt_index for row in rows], [row.sample_index for row in rows]
    table["length"], table["offset"] = lengths, begin + BYTES * np.cumsum([0, *lengths])[: len(rows)]
    directory = samples / TRAINED.name(step)
    directory.mkdir(parents=True, exist_ok=True)
    fresh = directory / f".rank_{rank:05d}.{os.getpid()}"
    with fresh.open("wb") as file:
        file.write(MAGIC + np.uint32(len(rows)).astype("<u4").tobytes() + table.tobytes())
        file.writelines(row.log_ratios.astype("<f2").tobytes() for row in rows)
    fresh.replace(directory / f"rank_{rank:05d}.bin")


def find_log_ratios(samples: Path, step: int) -> dict[tuple[int, int], StoredRatios]:
    """What is stored of the responses of a step, by prompt and sample; the tokens are not read.

    A file that is not whole is left out: a run may be writing, removing or replacing meanwhile.
    """
    found: dict[tuple[int, int], StoredRatios] = {}
    for file in sorted((samples / TRAINED.name(step)).glob("rank_*.bin")):
        try:
            found |= _read_table(file)
        except (OSError, ValueError):
            continue
    return found


def _read_table(file: Path) -> dict[tuple[int, int], StoredRatios]:
    with file.open("rb") as opened:
        magic, count = opened.read(len(MAGIC)), opened.read(4)
        if magic != MAGIC or len(count) != 4:
            raise ValueError(f"{file} is no file of log-ratios")
        size = int(np.frombuffer(count, "<u4")[0])
        table = np.frombuffer(opened.read(size * RECORD.itemsize), RECORD)
    if len(table) != size:
        raise ValueError(f"{file} is cut")
    return {
        (prompt, sample): StoredRatios(left, right, length, file, offset)
        for prompt, sample, length, offset, left, right in table.tolist()
    }
