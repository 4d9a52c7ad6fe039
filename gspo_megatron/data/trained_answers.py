"""Reads the responses that a run trained on, step by step, also while it writes them or after it was cut off.

The index of the sample store names them (`SampleStore.record_step`). A line that is not whole yet is left for later; a
step that was run again counts once, as its last attempt had it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from gspo_megatron.data.store import INDEX, DamagedSample, SampleStore, StepRecord
from gspo_megatron.types import SampleRef

_STEP = re.compile(rb'^\{"step":\s*([0-9]+),')
_RECORD = TypeAdapter(StepRecord)


@dataclass(frozen=True, slots=True)
class TrainedAnswer:
    """One response, by its metadata; its tokens are read when they are asked for."""

    step: int
    ref: SampleRef
    store: SampleStore

    def token_ids(self) -> tuple[list[int], list[int]] | None:
        """Ids of prompt and response; None where they are no longer on the disk."""
        try:
            ids, start, _ = self.store.read(self.ref)
        except DamagedSample:
            return None
        return ids[:start].tolist(), ids[start:].tolist()


def read_steps(samples: Path, wants: Callable[[int], bool] = lambda step: True) -> Iterator[TrainedAnswer]:
    """Read the metadata of every trained response, in order of step, prompt and sample.

    Args:
        samples: directory of the sample store; nothing is read where it does not exist.
        wants: which steps.
    """
    index = samples / INDEX
    if not index.is_file():
        return
    store = SampleStore(samples)
    places = {step: place for step, place in _places(index).items() if wants(step)}
    with index.open("rb") as file:
        for step in sorted(places):
            file.seek(places[step])
            for ref in _RECORD.validate_json(file.readline()).samples:
                yield TrainedAnswer(step, ref, store)


def _places(index: Path) -> dict[int, int]:
    """Byte at which the last whole line of each step begins."""
    places, place = {}, 0
    with index.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and (match := _STEP.match(line)):
                places[int(match[1])] = place
            place += len(line)
    return places
