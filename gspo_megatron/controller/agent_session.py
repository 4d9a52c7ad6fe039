"""One episode of an agent: its requests become one response, whose ids only grow.

A request whose messages continue the last answer gets the template's rendering of the new messages appended, masked.
One that goes back to an earlier answer continues there: what was sampled behind it is dropped and counted. One that
changes what stands before every answer begins the response anew. So each trained token is one that was sampled.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from gspo_megatron.controller.chat_format import ChatRequest, ChatTurn, RequestError, same_message
from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.data.conversation import ChatTokenizer, encode_continuation, encode_opening
from gspo_megatron.environments.tool_calls import TurnText, read_turn
from gspo_megatron.types import StopReason

FULL = "context_length_exceeded"
"""Code of a refusal for lack of room or turns: the response is truncated."""


class AgentTokenizer(ChatTokenizer, Protocol):
    """What an episode needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """What ends an episode."""

    max_prompt_tokens: int
    """Of the first request."""
    max_turns: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A place of the response from which requests can continue: behind an answer."""

    messages: int
    """Messages up to the answer, it included."""
    tokens: int
    """Length of the response there."""
    sampled: int
    """Tokens of the answer."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a turn begins."""

    base: Answered | None
    """The answer that it continues; None = the response begins anew."""
    prompt: tuple[int, ...]
    """Ids of the prompt."""
    added: tuple[int, ...]
    """Ids behind the answer: its end and the new messages."""
    rerenders: bool
    """The template would now write what the response has in other ids. Those of the response stay."""


@dataclass(slots=True, eq=False)
class Session:
    """The state of one episode."""

    generation: Generation
    sampling: Sampling
    tokenizer: AgentTokenizer
    limits: EpisodeLimits
    sample: Callable[[Generation, Sampling], Awaitable[StopReason]]
    """Samples one turn to its end, through interruptions."""
    counts: Counter[str]
    """Counters of the step."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Messages of the response, answers included."""
    tools: tuple[dict[str, Any], ...] = ()
    answers: list[Answered] = field(default_factory=list)
    turns: int = 0
    """Requests that were answered, dropped ones included."""
    reason: StopReason = "abort"
    """Why the last turn ended; `abort` before the first."""
    is_full: bool = False
    """A request was refused because the response has no room or no turn left."""
    pending: int = 0
    """Requests that are being answered."""
    own_seconds: float = 0.0
    """Time outside requests, up to `_since`."""
    _since: float = field(default_factory=time.monotonic)
    _alone: asyncio.Lock = field(default_factory=asyncio.Lock)

    def spent(self) -> float:
        """Seconds that the agent took outside its requests."""
        return self.own_seconds + (0.0 if self.pending else time.monotonic() - self._since)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The agent waits for an answer: its clock stands still."""
        if not self.pending:
            self.own_seconds += time.monotonic() - self._since
        self.pending += 1
        try:
            yield
        finally:
            self.pending -= 1
            self._since = time.monotonic()

    async def answer(self, request: ChatRequest) -> ChatTurn:
        """Sample the next turn. Requests of one episode are answered one after the other.

        Raises:
            RequestError: the messages cannot be rendered, or there is no room left.
        """
        async with self._alone:
            try:
                self._begin(request, await asyncio.to_thread(self._plan, request))
            except RequestError as error:
                self.is_full = self.is_full or error.code == FULL
                raise
            generation, start = self.generation, len(self.generation)
            try:
                self.reason = await self.sample(generation, self._limit(request, start))
            except BaseException:
                # The client is gone, or the run ends: an unfinished turn is not part of the response.
                generation.abandon(start)
                raise
            self.turns += 1
            self.is_full = False
            return self._record(request, start)

    def _limit(self, request: ChatRequest, start: int) -> Sampling:
        most = self.sampling.max_tokens if self.generation.limit is None else self.generation.limit
        return replace(
            self.sampling, max_tokens=most if request.max_tokens is None else min(most, start + request.max_tokens)
        )

    def _plan(self, request: ChatRequest) -> Start:
        """Where the next turn begins. Changes nothing: it runs in a thread."""
        if self.turns >= self.limits.max_turns:
            raise RequestError(f"agent.max_turns={self.limits.max_turns} requests were answered", FULL)
        base, generation, messages = self._find_base(request), self.generation, request.messages
        opening = self._encode(encode_opening, messages, list(request.tools) or None)
        if base is None:
            _check_room(len(opening), self.limits.max_prompt_tokens, "rollout.max_prompt_tokens")
            return Start(None, tuple(opening), (), False)
        tokens, prompt = base.tokens, generation.prompt.token_ids
        added = self._encode(encode_continuation, messages[base.messages :], generation.token_ids[tokens - 1])
        most = self.sampling.max_tokens if generation.limit is None else generation.limit
        _check_room(tokens + len(added) + 1, most, "rollout.max_answer_tokens")
        rerenders = opening != [*prompt, *generation.token_ids[:tokens], *added]
        return Start(base, prompt, tuple(added), rerenders)

    def _begin(self, request: ChatRequest, start: Start) -> None:
        """Bring the response to where the next turn begins."""
        base, generation = start.base, self.generation
        if self.answers and base is not self.answers[-1]:
            self.counts["branches"] += 1
        if base is None:
            self.counts["retokenized"] += self._retokenized(request.messages)
            generation.prompt = replace(generation.prompt, token_ids=start.prompt)
        self.counts["rerendered"] += start.rerenders
        tokens = 0 if base is None else base.tokens
        generation.abandon(tokens)
        if start.added:
            generation.put_in(start.added, "observation")
        self.answers = [one for one in self.answers if one.tokens <= tokens]
        self.history, self.tools = [*request.messages], request.tools

    def _find_base(self, request: ChatRequest) -> Answered | None:
        """The last answer that the messages continue; None where they change what stands before all of them."""
        if request.tools != self.tools:
            return None
        same = 0
        for sent, recorded in zip(request.messages, self.history, strict=False):
            if not same_message(sent, recorded):
                break
            same += 1
        for answered in reversed(self.answers):
            rest = request.messages[answered.messages :]
            if answered.messages <= same and rest and all(message["role"] != "assistant" for message in rest):
                return answered
        return None

    def _retokenized(self, messages: Sequence[dict[str, Any]]) -> int:
        """Sampled tokens that come back as text within messages that begin a response anew."""
        said = [(self.history[one.messages - 1], one.sampled) for one in self.answers]
        return sum(
            max((tokens for recorded, tokens in said if same_message(message, recorded)), default=0)
            for message in messages
            if message["role"] == "assistant"
        )

    def _encode(self, encode: Callable[..., list[int]], *given: Any) -> list[int]:
        try:
            return encode(self.tokenizer, *given)
        except ValueError as error:
            raise RequestError(str(error)) from None

    def _record(self, request: ChatRequest, start: int) -> ChatTurn:
        """Write the turn that was sampled from `start` on."""
        generation, stops = self.generation, self.tokenizer.stop_ids
        ids = generation.token_ids[start:].tolist()
        text = self.tokenizer.decode(ids[:-1] if ids[-1:] and ids[-1] in stops else ids)
        turn = read_turn(text) if request.reads_calls else TurnText(text, (), False)
        self.counts["malformed"] += turn.is_malformed
        put_in = {place for span in generation.masked for place in range(span.start, span.end)}
        kept = [place for place in range(start, len(generation)) if place not in put_in]
        # Greedy turns come without log-probs.
        with_logprobs = request.logprobs and self.sampling.temperature > 0
        made = ChatTurn(
            turn=turn,
            reason=self.reason,
            prompt_tokens=len(generation.prompt.token_ids) + start,
            pieces=tuple(self.tokenizer.decode([generation.token_ids[place]]) for place in kept)
            if request.logprobs
            else (),
            logprobs=tuple(generation.logprobs[place] for place in kept) if with_logprobs else (),
            number=self.turns,
            completion_tokens=len(ids),
        )
        self.history.append(made.message() | {"content": made.turn.content})
        self.answers.append(Answered(len(self.history), len(generation), len(kept)))
        return made


def _check_room(tokens: int, most: int, key: str) -> None:
    if tokens > most:
        raise RequestError(f"the messages need {tokens} tokens, {key}={most}", FULL)
