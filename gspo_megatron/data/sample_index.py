"""Which samples a step trains on, with their rewards and questions: one index a step, for people and tools.

    samples/step_000012.jsonl       a line a group: {"format": 1, "step": 12, "prompt": {...}, "samples": [{...}]}

It appears under its name when it is complete. `read_samples` is the way to read it:

    store = SampleStore(RunDir(run_dir).samples)
    for sample in read_samples(store.directory, lambda step: step == 12):
        ids, start, logprobs = store.read(sample.ref)      # prompt and response; the response starts at `start`
        print(sample.step, sample.reward, sample.is_clipped, sample.ref.stop_reason, sample.question)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gspo_megatron.run_dir import NumberedName
from gspo_megatron.types import Prompt, SampleRef

INDEX = NumberedName("step", 6, ".jsonl")
"""Indexes, by step."""
FORMAT = 1
StepGroup = tuple[Prompt, Sequence[SampleRef]]
"""A prompt, and its samples in order."""


class _Asked(BaseModel):
    """What is kept of a prompt."""

    model_config = ConfigDict(frozen=True)

    index: int
    id: str
    question: str
    answer: str | None = None
    source: str = ""


class _Line(BaseModel):
    """One line of an index."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    step: int
    prompt: _Asked
    samples: tuple[SampleRef, ...]


REFS = TypeAdapter(tuple[SampleRef, ...])


@dataclass(frozen=True, slots=True)
class StoredSample:
    """A sample that a step trained on."""

    step: int
    """Rollout batch that it was handed out for, from 1."""
    ref: SampleRef
    """Lengths, stop reason, reward parts, weight versions, and the place of its tokens."""
    problem: str
    """`Problem.id`."""
    question: str
    """Text of the task."""
    gold: str | None
    """The gold answer; None = its line has none."""
    source: str
    """Collection that the problem comes from."""

    @property
    def reward(self) -> float:
        """Score within `reward.bounds`, before the length rule."""
        return self.ref.reward

    @property
    def is_clipped(self) -> bool:
        """Whether the response was cut at its limit."""
        return self.ref.stop_reason == "length"


def write_index(directory: Path, step: int, groups: Iterable[StepGroup]) -> None:
    """Write the index of a step; an older one of the same step was of a lost attempt."""
    lines = []
    for prompt, refs in groups:
        problem = prompt.problem
        asked = _Asked(
            index=prompt.index, id=problem.id, question=_clean(problem.question), answer=problem.answer,
            source=problem.source,
        )  # fmt: skip
        content: dict[str, Any] = {"format": FORMAT, "step": step, "prompt": asked.model_dump()}
        lines.append(json.dumps({**content, "samples": REFS.dump_python(tuple(refs), mode="json")}) + "\n")
    final = directory / INDEX.name(step)
    fresh = directory / f".{final.name}.{os.getpid()}"
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(final)


def list_steps(directory: Path) -> list[int]:
    """Steps whose samples are kept, in order.

    Args:
        directory: `samples` of the run directory.
    """
    return list(INDEX.find(directory))


def read_samples(directory: Path, wants: Callable[[int], bool] = lambda step: True) -> Iterator[StoredSample]:
    """The samples of steps, in order of step and prompt; their tokens are read with `SampleStore.read`.

    A run may be writing meanwhile: a step appears whole, or not yet.

    Args:
        directory: `samples` of the run directory.
        wants: which steps, of those that are kept.

    Raises:
        ValueError: an index that is not what was written, with its name and line.
    """
    for step, file in INDEX.find(directory).items():
        if wants(step):
            for line in _lines(file):
                asked = line.prompt
                for ref in line.samples:
                    yield StoredSample(step, ref, asked.id, asked.question, asked.answer, asked.source)


def read_refs(file: Path) -> Iterator[SampleRef]:
    """The references of one index. Raises ValueError as `read_samples`."""
    for line in _lines(file):
        yield from line.samples


def _lines(file: Path) -> Iterator[_Line]:
    with file.open(encoding="utf-8") as opened:
        for number, text in enumerate(opened, 1):
            try:
                yield _Line.model_validate_json(text)
            except ValidationError as error:
                fault = error.errors(include_url=False)[0]
                where = ".".join(map(str, fault["loc"]))
                raise ValueError(f"{file}:{number} is no line of an index: {where} {fault['msg']}") from None


def _clean(text: str) -> str:
    """A text that UTF-8 can hold: a lone surrogate becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
