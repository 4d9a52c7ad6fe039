"""The responses of a run or an evaluation, read back by a filter."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, get_args

from gspo_megatron.models import load_resolved
from gspo_megatron.run_dir import RunDir
from gspo_megatron.types import StopReason

if TYPE_CHECKING:  # numpy
    from gspo_megatron.data.sample_index import StoredSample
    from gspo_megatron.data.tokenizers import Tokenizer

NO_STEP = -1
"""An evaluation has no steps."""


@dataclass(frozen=True, slots=True)
class AnswerFilter:
    """Which responses."""

    steps: tuple[float, float] = (-math.inf, math.inf)
    rewards: tuple[float, float] = (-math.inf, math.inf)
    stop_reasons: frozenset[str] = frozenset(get_args(StopReason))
    contains: str = ""
    """Text that the question must hold, in any case of letters."""

    def wants(self, answer: dict[str, Any]) -> bool:
        """Whether the metadata of a response fit; its texts are not read."""
        fits = self.rewards[0] <= answer["reward"] <= self.rewards[1]
        return fits and answer["stop_reason"] in self.stop_reasons

    def wants_step(self, step: int) -> bool:
        """Whether the responses of a step are asked for."""
        return self.steps[0] <= step <= self.steps[1]


def write_prompt(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a prompt with the ends of its turns, which are stop ids and left out of responses."""
    runs = [(ends, list(run)) for ends, run in groupby(ids, key=lambda one: one in tokenizer.stop_ids)]
    return "".join("".join(tokenizer.pieces(run)) if ends else tokenizer.decode(run) for ends, run in runs)


class AnswerReader:
    """Responses of one directory that a filter wants."""

    def __init__(self, run: RunDir, wanted: AnswerFilter) -> None:
        self.gone = 0
        """Responses that fit by their metadata, and whose texts are not there any more."""
        self._run, self._filter = run, wanted

    def read(self) -> Iterator[dict[str, Any]]:
        """Responses in order of step, prompt and sample; those of an evaluation as they were scored."""
        lines = self._evaluated() if self._run.answers.is_file() else self._trained()
        text = self._filter.contains.casefold()
        return (line for line in lines if text in line["question"].casefold())

    def _evaluated(self) -> Iterator[dict[str, Any]]:
        with self._run.answers.open(encoding="ascii") as file:
            for line in file:
                # The last one may be half-written.
                if line.endswith("\n") and self._filter.wants(answer := json.loads(line)):
                    yield {"step": NO_STEP, **answer}

    def _trained(self) -> Iterator[dict[str, Any]]:
        from gspo_megatron.data.sample_index import read_samples
        from gspo_megatron.data.store import DamagedSample, SampleStore

        store = SampleStore(self._run.samples)
        for sample in read_samples(store.directory, self._filter.wants_step):
            line = _metadata(sample)
            if not self._filter.wants(line):
                continue
            try:
                ids, start, _ = store.read(sample.ref)
            except DamagedSample:
                self.gone += 1
                continue
            question = write_prompt(self._tokenizer, ids[:start].tolist())
            yield {**line, "question": question, "response": self._tokenizer.decode(ids[start:].tolist())}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from gspo_megatron.data.tokenizers import load_tokenizer

        recipe = load_resolved(self._run.recipe)
        return load_tokenizer(recipe.tokenizer, recipe.model.path)


def _metadata(sample: StoredSample) -> dict[str, Any]:
    ref = sample.ref
    return {
        "step": sample.step,
        "prompt": ref.prompt_index,
        "sample": ref.sample_index,
        "reward": ref.reward,
        "parts": dict(ref.parts),
        "unscored": ref.unscored,
        "stop_reason": ref.stop_reason,
        "tokens": ref.answer_length,
        "versions": [ref.segments[0].version, ref.segments[-1].version] if ref.segments else [],
    }
