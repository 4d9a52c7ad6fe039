"""How far a batch is, and what it says of itself by the metadata of its answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import SampleRef


@dataclass(slots=True)
class Progress:
    """How far the present phase is."""

    total: int = 0
    """Answers asked for."""
    started: float = 0.0
    """Monotonic clock at the start of the phase."""
    done: int = 0
    """Answers finished and scored."""
    tokens: int = 0
    """Answer tokens of the finished ones."""

    def report(self) -> dict[str, float]:
        """As JSON, with the seconds so far."""
        seconds = time.monotonic() - self.started if self.total else 0.0
        done = min(self.done, self.total)
        return {"done": done, "total": self.total, "tokens": self.tokens, "seconds": seconds}


def measure_answers(recipe: Recipe, samples: Sequence[SampleRef], step: int) -> dict[str, float]:
    """Metrics of the answers of one step, those of policies that the recipe does not use left out."""
    count, rollout = len(samples), recipe.rollout
    tokens = sum(ref.answer_length for ref in samples)
    spans = [span.why for ref in samples for span in ref.masked]
    found = {
        "answer_length": tokens / count,
        "truncated": sum(ref.stop_reason == "length" for ref in samples) / count,
    }
    if rollout.repetition_halt is not None:
        found["halted"] = sum(ref.stop_reason == "repetition" for ref in samples) / count
    if rollout.length_stages:
        found["answer_limit"] = float(rollout.answer_limit(step))
    if rollout.thinking is not None:
        found["thinking_closed"] = spans.count("closing") / count
    if recipe.environment is not None:
        found["tool_calls"] = spans.count("observation") / count
    if rollout.thinking is not None or recipe.environment is not None:
        found["masked_tokens"] = 1 - sum(ref.trained_length for ref in samples) / max(tokens, 1)
    return found


def measure_staleness(samples: Sequence[SampleRef], version: int) -> dict[str, float]:
    """How many versions of the weights the tokens of a batch are behind: `mean` over tokens, and `largest`."""
    behind = [(version - span.version, span.end - span.start) for ref in samples for span in ref.segments]
    tokens = sum(count for _, count in behind)
    return {
        "mean": sum(lag * count for lag, count in behind) / max(tokens, 1),
        "largest": max((lag for lag, _ in behind), default=0),
    }
