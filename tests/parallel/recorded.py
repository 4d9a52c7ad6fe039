"""The controller of the resume tests: answers what was recorded beforehand, and counts like the real one."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from gspo_megatron.data.store import SampleStore
from gspo_megatron.transport.messages import (
    Accounting,
    ControllerState,
    EvaluationReport,
    EvaluationRequest,
    ProgressReport,
    RolloutBatch,
    RolloutRequest,
    Staleness,
    StreamState,
    TokenCount,
)
from gspo_megatron.transport.update_messages import UpdateCheck, UpdateReport
from gspo_megatron.types import Problem, Prompt, Response, SampleRef, Segment

VOCABULARY = 96
PROMPT_LENGTH = 6


class RecordedController:
    """Stands where `ControllerClient` is expected, on rank 0."""

    def __init__(self, store: SampleStore, prompts: int, answers: int) -> None:
        self.store, self.prompts, self.answers = store, prompts, answers
        self.position = 0
        self.served: list[int] = []

    def wait_ready(self, timeout: float, on_status: Callable[[Any], None]) -> None:
        """Nothing to wait for."""

    def rollout(self, request: RolloutRequest, on_progress: Callable[[ProgressReport], None]) -> RolloutBatch:
        """The next prompts of the stream with their recorded responses."""
        indices = range(self.position, self.position + self.prompts)
        self.position += self.prompts
        groups = [
            (asked(prompt, ()), [record(self.store, prompt, sample) for sample in range(self.answers)])
            for prompt in indices
        ]
        self.store.finish_step(request.step, groups, (), None)
        refs = [ref for _, members in groups for ref in members]
        tokens = sum(ref.answer_length for ref in refs)
        taken = TokenCount(tokens=tokens, prompts=self.prompts)
        return RolloutBatch(
            samples=tuple(refs),
            seconds=0.0,
            tokens=tokens,
            measures={"answer_length": tokens / len(refs)},
            staleness=Staleness(mean=0.0, largest=0),
            accounting=Accounting(sampled_tokens=tokens, taken=taken, dropped={}, in_flight=TokenCount()),
            unscored={},
            skipped_prompts={},
        )

    def evaluate(self, request: EvaluationRequest, on_progress: Callable[[ProgressReport], None]) -> EvaluationReport:
        """A fixed evaluation."""
        return EvaluationReport(
            accuracy=0.0,
            mean_reward=0.0,
            mean_length=1.0,
            unscored=0,
            problems=1,
            answers=1,
            temperature=0.0,
            examples=(),
        )

    def finish_update(self, request: UpdateCheck) -> UpdateReport:
        """Every update arrives, and whatever is measured of it is 0."""
        return UpdateReport(
            largest=0.0, mean=0.0, seconds=0.0, transfer_seconds=0.0, received_over_needed=0.0, servers={}
        )

    def sleep(self) -> None:
        """No server is awake."""

    def state(self) -> ControllerState:
        """The place in the stream."""
        nothing = Accounting(sampled_tokens=0, taken=TokenCount(), dropped={}, in_flight=TokenCount())
        stream = StreamState(index=self.position, position=self.position, skipped={}, fingerprint="")
        return ControllerState(stream=stream, groups=(), accounting=nothing, store="", generations=())

    def restore(self, state: ControllerState) -> None:
        """Continue there."""
        self.position = state.stream.position


class NoServers:
    """Stands where `WeightSender` is expected."""

    def update(self, *_: Any) -> list[int]:
        """There is nobody to send to."""
        return []


def asked(prompt: int, token_ids: tuple[int, ...]) -> Prompt:
    """A prompt at its place in the stream."""
    return Prompt(prompt, Problem(str(prompt), "", {}), token_ids)


def record(store: SampleStore, prompt: int, sample: int) -> SampleRef:
    """One answer that depends on nothing but its place."""
    generator = np.random.default_rng(zlib.crc32(f"{prompt}/{sample}".encode()))
    length = int(generator.integers(2, 20))
    ids = generator.integers(0, VOCABULARY, PROMPT_LENGTH + length).astype(np.int32)
    logprobs = generator.normal(-4.5, 0.1, length).astype(np.float32)
    reward = float(generator.integers(0, 2))
    # Two of eight experts in each of four layers, as recipes/tiny_moe.yaml has them.
    routes = generator.random((PROMPT_LENGTH + length - 1, 4, 8)).argsort(-1)[..., :2].astype(np.uint8)
    answer = Response(prompt, sample, ids[PROMPT_LENGTH:], logprobs, (Segment(0, 0, length),), "stop", routes)
    return store.write(asked(prompt, tuple(ids[:PROMPT_LENGTH].tolist())), answer, reward)
