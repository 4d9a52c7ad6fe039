"""The controller of the resume tests: answers what was recorded beforehand, and counts like the real one."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gspo_megatron.data.store import SampleStore
from gspo_megatron.types import Problem, Prompt, Response, SampleRef, Segment

VOCABULARY = 96
PROMPT_LENGTH = 6


class RecordedLink:
    """Stands where `ControllerClient` is expected, on rank 0."""

    def __init__(self, store: SampleStore, prompts: int, answers: int) -> None:
        self.store, self.prompts, self.answers = store, prompts, answers
        self.position = 0
        self.served: list[int] = []

    def wait_ready(self, timeout: float, on_status: Callable[[Any], None]) -> None:
        """Nothing to wait for."""

    def rollout(self, step: int, on_progress: Callable[[Any], None]) -> dict[str, Any]:
        """The next prompts of the stream with their recorded answers."""
        indices = range(self.position, self.position + self.prompts)
        self.position += self.prompts
        refs = [record(self.store, prompt, sample) for prompt in indices for sample in range(self.answers)]
        tokens = sum(ref.answer_length for ref in refs)
        accounting = {"sampled_tokens": tokens, "carried": {"tokens": 0}, "dropped": {}}
        measures = {"answer_length": tokens / len(refs)}
        told = {"seconds": 0.0, "staleness": {}, "measures": measures, "accounting": accounting}
        return {"samples": refs, "tokens": tokens, **told}

    def evaluate(self, problems: int, answers: int, temperature: float, on_progress: Any) -> dict[str, Any]:
        """A fixed evaluation."""
        return {"accuracy": 0.0, "mean_reward": 0.0, "mean_length": 1.0, "examples": []}

    def finish_update(self, version: int, checksums: Any, probes: Sequence[Any]) -> dict[str, float]:
        """Every update arrives, and whatever is measured of it is nothing."""
        return defaultdict(float)

    def sleep(self) -> None:
        """Nobody is awake."""

    def state(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"stream": {"position": self.position}}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self.position = state["stream"]["position"]


class NoServers:
    """Stands where `WeightSender` is expected."""

    def update(self, *_: Any) -> list[int]:
        """There is nobody to send to."""
        return []


def record(store: SampleStore, prompt: int, sample: int) -> SampleRef:
    """One answer that depends on nothing but its place, written if it is not there yet."""
    generator = np.random.default_rng(zlib.crc32(f"{prompt}/{sample}".encode()))
    length = int(generator.integers(2, 20))
    ids = generator.integers(0, VOCABULARY, PROMPT_LENGTH + length).astype(np.int32)
    logprobs = generator.normal(-4.5, 0.1, length).astype(np.float32)
    reward = float(generator.integers(0, 2))
    answer = Response(prompt, sample, ids[PROMPT_LENGTH:], logprobs, (Segment(0, 0, length),), "stop")
    asked = Prompt(prompt, Problem(str(prompt), "", {}), tuple(ids[:PROMPT_LENGTH].tolist()))
    return store.write(asked, answer, reward)
