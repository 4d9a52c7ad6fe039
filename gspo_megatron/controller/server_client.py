"""An asynchronous client of one vLLM server: token ids in, token ids and log-probs out.

Whatever would kill the server or be cut silently (an id outside the vocabulary, a length beyond the context) is
refused here, before it is sent.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import aiohttp

from gspo_megatron.controller.generation import Generation, Sampling, request_body
from gspo_megatron.controller.server_admin import CONTROL_SECONDS, ServerAdmin, ServerError
from gspo_megatron.transport.server_paths import GENERATE
from gspo_megatron.types import Segment, StopReason

DATA, DONE = b"data: ", b"data: [DONE]"
GENERATED_TOKENS = re.compile(rb"^vllm:generation_tokens_total\{[^}]*\} ([0-9.e+]+)", re.MULTILINE)
STALL_SECONDS = 300.0
"""A server that holds requests and yields neither a token nor an answer for so long is taken for dead."""
ABORT_SECONDS = 0.5
"""Time that aborted answers have to arrive before the abort is repeated."""


class ServerClient(ServerAdmin):
    """One vLLM server."""

    def __init__(self, url: str, key: str, vocab_size: int, context: int, concurrency: int) -> None:
        super().__init__(url, key)
        self.vocab_size = vocab_size
        self.context = context
        self.slots = concurrency
        """Answers that it may hold at a time."""
        self.generations: set[Generation] = set()
        """Answers that it is sampling."""
        self._readers: set[asyncio.Task[Any]] = set()

    def check(self, token_ids: Sequence[int], max_tokens: int) -> None:
        """Refuse what the server must not see. Raises ValueError."""
        if not token_ids:
            raise ValueError("an empty prompt cannot be answered; drop it")
        if not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < self.vocab_size)
            raise ValueError(
                f"token id {wrong} lies outside the model's vocabulary of {self.vocab_size}; use its own tokenizer"
            )
        if len(token_ids) + max_tokens > self.context:
            raise ValueError(
                f"a prompt of {len(token_ids)} tokens and an answer of up to {max_tokens} exceed the server's context "
                f"of {self.context}; raise rollout.max_prompt_tokens or drop the prompt"
            )

    async def generate(
        self, generation: Generation, sampling: Sampling, version: Callable[[], int | None]
    ) -> StopReason:
        """Sample the rest of an answer into its draft, as it arrives.

        Args:
            draft: what is there so far; keeps all that came when this raises or is interrupted.
            sampling: how.
            version: what the servers hold at this moment; None while an update is under way.

        Raises:
            ServerError: the server died. Tokens that came during an unfinished update are gone from the draft.
            ValueError: the server must not see this prompt.
        """
        start, left = len(generation), sampling.max_tokens - len(generation)
        self.check(generation.request_ids, left)
        label = version()
        assert label is not None, "nothing may be sampled while the weights change"
        body = request_body(generation, sampling, left)
        generation.parts += 1
        self.generations.add(generation)
        certain, reason, spans = start, None, ()
        try:
            async with aclosing(self._stream(body)) as chunks:
                async for choice in chunks:
                    entries = choice["logprobs"]["content"] if choice["logprobs"] else ()
                    # What a chunk holds was begun when the one before it came: at worst it is labelled as too old.
                    generation.extend(choice["token_ids"] or (), [entry["logprob"] for entry in entries], label)
                    generation.received(len(choice["token_ids"] or ()))
                    label = label if (now := version()) is None else now
                    certain = certain if now is None else len(generation)
                    reason, spans = choice["finish_reason"], choice["weight_versions"] or ()
            if reason is None:
                raise ServerError(f"server {self.url} broke off an answer")
        except ServerError:
            generation.cut(certain)
            raise
        finally:
            self.generations.discard(generation)
        generation.relabel(start, read_segments(spans))
        return _stop_reason(reason, self.url)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of token_ids[1:] under the server's weights at temperature 1, [length - 1]."""
        self.check(token_ids, 1)
        body = {
            "token_ids": list(token_ids),
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False},
        }
        answer = await self.call("POST", GENERATE, body, timeout=STALL_SECONDS)
        rows = answer["prompt_logprobs"][1:]
        return [float(row[str(token)]["logprob"]) for row, token in zip(rows, token_ids[1:], strict=True)]

    async def _stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of one answer. Raises ServerError when the server dies, or is given up by `watch`."""
        if self.fault:
            raise ServerError(self.fault)
        reader = asyncio.current_task()
        assert reader is not None
        self._readers.add(reader)
        try:
            url = self.url + GENERATE
            async with self._session.post(url, json=body, timeout=aiohttp.ClientTimeout(sock_connect=10)) as response:
                await self._need_success(response, GENERATE)
                async for line in response.content:
                    if line.startswith(DATA) and not line.startswith(DONE):
                        yield json.loads(line[len(DATA) :])["choices"][0]
        # A dying engine ends its streams in any of these ways, an error message instead of a chunk included.
        except (aiohttp.ClientError, ValueError, LookupError) as error:
            raise ServerError(f"server {self.url} is gone: {type(error).__name__} on {GENERATE}") from None
        except asyncio.CancelledError:
            if self.fault:
                raise ServerError(self.fault) from None
            raise
        finally:
            self._readers.discard(reader)

    async def interrupt(self) -> None:
        """End all answers under way where they are; their drafts keep what was sampled."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + CONTROL_SECONDS
        while True:
            await self.call("POST", "/pause?mode=abort", timeout=CONTROL_SECONDS)
            settled = clock() + ABORT_SECONDS
            while self._readers and clock() < settled:
                await asyncio.sleep(0.01)
            await self.resume()
            if not self._readers:
                return
            # A request that was on its way came in after the abort and was held: it needs another one.
            if clock() > deadline:
                raise ServerError(f"server {self.url} holds {len(self._readers)} answers that it was told to end")

    async def generated_tokens(self) -> int:
        """Tokens generated since the server started."""
        found = GENERATED_TOKENS.search(await self.call("GET", "/metrics", timeout=CONTROL_SECONDS))
        return int(float(found.group(1))) if found else 0

    async def watch(self, stall_seconds: float = STALL_SECONDS) -> None:
        """Give the server up when it holds requests and makes no progress: an engine that dies while it shuts down
        leaves them unanswered for ever. Their waiters then get a ServerError. Runs until cancelled."""
        clock = asyncio.get_running_loop().time
        seen, since = -1, clock()
        while not self.fault:
            await asyncio.sleep(min(5.0, stall_seconds / 4))
            try:
                tokens = await self.generated_tokens()
            except ServerError:
                tokens = seen
            if tokens != seen or not self._readers:
                seen, since = tokens, clock()
            elif clock() - since > stall_seconds:
                waiting = len(self._readers)
                self.fault = f"server {self.url} made no progress on {waiting} answers for {stall_seconds:g} s"
                for reader in self._readers:
                    reader.cancel()


def read_segments(spans: Sequence[dict[str, Any]]) -> tuple[Segment, ...]:
    """vLLM's version spans as segments; the label is the version as text."""
    return tuple(Segment(int(span["version"]), span["start"], span["end"]) for span in spans)


def _stop_reason(reason: str | None, url: str) -> StopReason:
    if reason == "stop" or reason == "length" or reason == "repetition" or reason == "abort":
        return reason
    raise ServerError(f"server {url} ended an answer with finish_reason {reason}")
