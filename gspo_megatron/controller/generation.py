"""Generations: what was received of a response so far, from which the next request continues."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from gspo_megatron.config.long_responses import RepetitionHalt
from gspo_megatron.controller.recorded_routes import RecordedRoutes
from gspo_megatron.types import Masked, Prompt, Response, Segment, StopReason


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn."""

    temperature: float
    """0 = greedy."""
    max_tokens: int
    """Longest response, stop token included."""
    stop_ids: tuple[int, ...]
    """Token ids that end a response."""
    seed: int
    """The run's seed; every part of every response derives its own from it."""
    halt: RepetitionHalt | None = None
    """When a response counts as repeating itself; None = never."""
    routes: bool = False
    """Whether the sampler's choice of experts is recorded."""


def response_seed(seed: int, prompt_index: int, sample_index: int, part: int) -> int:
    """Seed of one part of one response: a continued one must not replay the random stream of its first part."""
    text = f"{seed}/{prompt_index}/{sample_index}/{part}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


@dataclass(slots=True, eq=False)
class Generation:
    """One response until it is finished. A lost server or an interruption only costs another request."""

    prompt: Prompt
    sample_index: int
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    """What there is so far; 100,000 tokens are 0.8 MB with their log-probs."""
    logprobs: array[float] = field(default_factory=lambda: array("f"))
    """One a token; empty for greedy responses, where no log-probs are read."""
    segments: list[Segment] = field(default_factory=list)
    """Cover the tokens in order."""
    parts: int = 0
    """Requests sent so far."""
    first_version: int | None = None
    """Version of the weights when the first request was sent."""
    lost: int = 0
    """Tokens that were sampled and could not be kept."""
    abandoned: int = 0
    """Tokens that were sampled on a way that an agent left."""
    received: Callable[[int], None] = lambda tokens: None
    """Called with the number of tokens whenever some are received."""
    masked: list[Masked] = field(default_factory=list)
    """Tokens that were put in and not sampled, in order."""
    state: Any = None
    """The environment's, behind the last observation; JSON-able."""
    limit: int | None = None
    """Longest that this response may get, of the step that started it; None = the sampling's own limit."""
    outcome: Any = None
    """The score that its agent or its environment gave, or a `Lost` where that failed; None = the reward scores it."""
    routes: RecordedRoutes = field(default_factory=RecordedRoutes)
    """Experts of prompt and response, each under the weights that its next token was sampled with."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def sampled(self) -> int:
        """Tokens that a server sampled."""
        return len(self) - sum(span.end - span.start for span in self.masked)

    @property
    def calls(self) -> int:
        """Times that an environment replied."""
        return sum(span.why == "observation" for span in self.masked)

    @property
    def turn_start(self) -> int:
        """First token of the present turn: behind the last observation."""
        return next((span.end for span in reversed(self.masked) if span.why == "observation"), 0)

    @property
    def last_sampled(self) -> int | None:
        """The last token, if it was sampled."""
        put_in = self.masked and self.masked[-1].end == len(self)
        return None if put_in or not self.token_ids else self.token_ids[-1]

    @property
    def request_ids(self) -> array[int]:
        """Ids that a continuing request starts from."""
        return array("i", self.prompt.token_ids) + self.token_ids

    def extend(self, token_ids: Sequence[int], logprobs: Sequence[float], version: int) -> None:
        """Take in tokens that were sampled under one version of the weights."""
        start = len(self)
        self.token_ids.extend(token_ids)
        self.logprobs.extend(logprobs)
        self._cover(Segment(version, start, len(self)))

    def put_in(self, token_ids: Sequence[int], why: Literal["observation", "closing"]) -> None:
        """Append tokens that were not sampled; they take the version of the token before them."""
        start, version = len(self), self.segments[-1].version
        self.extend(token_ids, [0.0] * len(token_ids), version)
        self.masked.append(Masked(start, len(self), why))

    def relabel(self, start: int, spans: Sequence[Segment]) -> None:
        """Replace the versions of the tokens from `start` on; spans count from there."""
        self._cut_segments(start)
        for span in spans:
            self._cover(Segment(span.version, start + span.start, start + span.end))

    def cut(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.lost += len(self) - length
        del self.token_ids[length:]
        del self.logprobs[length:]
        # The last token that is left was not routed yet. Without any, another prompt may take this one's place.
        self.routes.cut(len(self.prompt.token_ids) + length - 1 if length else 0)
        self._cut_segments(length)

    def abandon(self, length: int) -> None:
        """Forget the tokens from `length` on, which are not part of the response any more."""
        sampled, lost = self.sampled, self.lost
        self.masked[:] = [span for span in self.masked if span.end <= length]
        self.cut(length)
        self.lost = lost
        self.abandoned += sampled - self.sampled

    def response(self, stop_reason: StopReason) -> Response:
        """As the sample store takes it."""
        return Response(
            prompt_index=self.prompt.index,
            sample_index=self.sample_index,
            token_ids=np.array(self.token_ids, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            segments=tuple(self.segments),
            stop_reason=stop_reason,
            routes=self.routes.copy(),
            masked=tuple(self.masked),
            limit=self.limit,
        )

    def _cover(self, span: Segment) -> None:
        if span.start == span.end:
            return
        if self.segments and self.segments[-1].version == span.version:
            self.segments[-1] = Segment(span.version, self.segments[-1].start, span.end)
        else:
            self.segments.append(span)

    def _cut_segments(self, length: int) -> None:
        kept = [replace(span, end=min(span.end, length)) for span in self.segments if span.start < length]
        self.segments[:] = kept
