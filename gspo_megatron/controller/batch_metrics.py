"""Progress of a rollout or an evaluation, and the metrics of a batch from the metadata of its responses."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gspo_megatron.config.schema import Recipe
from gspo_megatron.transport.messages import ProgressReport, Staleness
from gspo_megatron.types import SampleRef


@dataclass(slots=True)
class Progress:
    """Progress of the present phase."""

    total: int = 0
    """Responses requested."""
    started: float = 0.0
    """Monotonic clock at the start of the phase."""
    done: int = 0
    """Responses finished and scored."""
    tokens: int = 0
    """Response tokens of the finished ones."""

    def report(self) -> ProgressReport:
        """The progress now."""
        seconds = time.monotonic() - self.started if self.total else 0.0
        return ProgressReport(done=min(self.done, self.total), total=self.total, tokens=self.tokens, seconds=seconds)


def measure_responses(recipe: Recipe, samples: Sequence[SampleRef], step: int) -> dict[str, float]:
    """Metrics of the responses of one step, without those of rollout policies that the recipe does not use."""
    count, rollout = len(samples), recipe.rollout
    tokens = sum(ref.answer_length for ref in samples)
    spans = [span.why for ref in samples for span in ref.masked]
    found = {
        "answer_length": tokens / count,
        "truncated": sum(ref.stop_reason == "length" for ref in samples) / count,
    }
    found |= measure_parts(samples)
    if rollout.repetition_halt is not None:
        found["halted"] = sum(ref.stop_reason == "repetition" for ref in samples) / count
    if rollout.length_stages:
        found["answer_limit"] = float(rollout.answer_limit(step))
    if rollout.thinking is not None:
        found["thinking_closed"] = spans.count("closing") / count
    if recipe.environment is not None:
        found["tool_calls"] = spans.count("observation") / count
    if rollout.thinking is not None or recipe.environment is not None or recipe.agent is not None:
        found["masked_tokens"] = 1 - sum(ref.trained_length for ref in samples) / max(tokens, 1)
    return found


def measure_parts(samples: Sequence[SampleRef]) -> dict[str, float]:
    """Mean of every named part of the rewards, over the responses that have it."""
    values: dict[str, list[float]] = {}
    for ref in samples:
        for name, value in ref.parts:
            values.setdefault(f"reward/{name}", []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def count_unscored(samples: Sequence[SampleRef]) -> dict[str, int]:
    """Responses without a score of their own, by the kind of fault."""
    return dict(Counter(ref.unscored for ref in samples if ref.unscored))


def measure_staleness(samples: Sequence[SampleRef], version: int) -> Staleness:
    """How many versions of the weights the tokens of a batch are behind."""
    behind = [(version - span.version, span.end - span.start) for ref in samples for span in ref.segments]
    tokens = sum(count for _, count in behind)
    mean = sum(lag * count for lag, count in behind) / max(tokens, 1)
    return Staleness(mean=mean, largest=max((lag for lag, _ in behind), default=0))
