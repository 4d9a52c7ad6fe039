"""An asynchronous client of one vLLM server: token ids in, token ids and log-probs out.

Whatever would kill the server or be cut silently (an id outside the vocabulary, a length beyond the context) is
refused here, before it is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import aiohttp
import numpy as np

from gspo_megatron.controller import vllm_format
from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.server_admin import CONTROL_SECONDS, JSON_HEADER, ServerAdmin, ServerError
from gspo_megatron.controller.vllm_format import FormatError, GenerationChunk
from gspo_megatron.transport.route_frames import HEADER, FrameError, read_frame
from gspo_megatron.transport.server_paths import GENERATE
from gspo_megatron.types import StopReason

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
        self._readers: set[asyncio.Task[object]] = set()

    def check(self, token_ids: Sequence[int], max_tokens: int, stop_ids: Sequence[int] = ()) -> None:
        """Refuse what the server must not see. Raises ValueError."""
        for stop in stop_ids:
            if not 0 <= stop < self.vocab_size:
                raise ValueError(
                    f"stop id {stop} lies outside the model's vocabulary of {self.vocab_size}; use its own tokenizer"
                )
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
        """Sample the rest of a response into its generation, as it arrives.

        Args:
            generation: what is there so far; keeps all that was received when this raises or is interrupted.
            sampling: how.
            version: what the servers hold at this moment; None while an update is in flight.

        Raises:
            ServerError: the server died. Tokens received during an unfinished update are removed.
            ValueError: the server must not see this prompt, or refuses it.
        """
        start, left = len(generation), sampling.max_tokens - len(generation)
        self.check(generation.request_ids, left, sampling.stop_ids)
        label = version()
        assert label is not None, "nothing may be sampled while the weights change"
        body = vllm_format.write_generation(generation, sampling, left)
        generation.parts += 1
        self.generations.add(generation)
        certain, reason, segments = start, None, ()
        try:
            async with aclosing(self._stream(body, sampling.routes)) as chunks:
                async for chunk in chunks:
                    self._keep_routes(generation, chunk)
                    # A chunk was started when the one before it came: at worst it is labelled as too old.
                    generation.extend(chunk.token_ids, chunk.logprobs, label)
                    generation.received(len(chunk.token_ids))
                    label = label if (now := version()) is None else now
                    certain = certain if now is None else len(generation)
                    reason, segments = chunk.finish_reason, chunk.segments
            if reason is None:
                raise ServerError(f"server {self.url} broke off an answer")
            self._check_routes(generation, sampling, start)
        except ServerError:
            generation.cut(certain)
            raise
        finally:
            self.generations.discard(generation)
        generation.relabel(start, segments)
        return _stop_reason(reason, self.url)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of token_ids[1:] under the server's weights at temperature 1, [length - 1]."""
        self.check(token_ids, 1)
        body = await self.call("POST", GENERATE, vllm_format.write_scoring(token_ids), timeout=STALL_SECONDS)
        with self._reading(GENERATE):
            return vllm_format.read_scores(body, token_ids)

    def _keep_routes(self, generation: Generation, chunk: GenerationChunk) -> None:
        try:
            if chunk.routes is not None:
                generation.routes.extend(chunk.routes)
        except FrameError as error:
            raise ServerError(f"server {self.url}: {error}") from None

    def _check_routes(self, generation: Generation, sampling: Sampling, start: int) -> None:
        """Raise ServerError unless every token but the last has its routes, where they are asked for."""
        wanted = len(generation.prompt.token_ids) + len(generation) - 1
        if sampling.routes and len(generation) > start and len(generation.routes) != wanted:
            raise ServerError(f"server {self.url} sent routes of {len(generation.routes)} tokens instead of {wanted}")

    async def _stream(self, body: bytes, routes: bool) -> AsyncGenerator[GenerationChunk, None]:
        """The chunks of one response. Raises ServerError when the server dies, or is given up by `watch`."""
        if self.fault:
            raise ServerError(self.fault)
        reader = asyncio.current_task()
        assert reader is not None
        self._readers.add(reader)
        try:
            url = self.url + GENERATE
            limit = aiohttp.ClientTimeout(sock_connect=10)
            headers = JSON_HEADER | ({HEADER: "1"} if routes else {})
            async with self._session.post(url, data=body, headers=headers, timeout=limit) as response:
                await self._need_success(response, GENERATE)
                rows: np.ndarray | None = None
                async for line in response.content:
                    if (frame := read_frame(line)) is not None:
                        rows = frame.read(await response.content.readexactly(frame.num_bytes + 1))
                    elif (chunk := vllm_format.read_chunk(line, rows)) is not None:
                        rows = None
                        yield chunk
        # A dying engine ends its streams in any of these ways, an error message instead of a chunk included.
        except (aiohttp.ClientError, FormatError, FrameError, asyncio.IncompleteReadError) as error:
            reason = str(error) if isinstance(error, FormatError | FrameError) else type(error).__name__
            raise ServerError(f"server {self.url} is gone: {reason} on {GENERATE}") from None
        except asyncio.CancelledError:
            if self.fault:
                raise ServerError(self.fault) from None
            raise
        finally:
            self._readers.discard(reader)

    async def interrupt(self) -> None:
        """Interrupt all generations in flight; they keep what was sampled."""
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
                raise ServerError(f"server {self.url} holds {len(self._readers)} requests that it was asked to end")

    async def generated_tokens(self) -> int:
        """Tokens generated since the server started."""
        return vllm_format.read_generated_tokens(await self.call("GET", "/metrics", timeout=CONTROL_SECONDS))

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


def _stop_reason(reason: str | None, url: str) -> StopReason:
    if reason == "stop" or reason == "length" or reason == "repetition" or reason == "abort":
        return reason
    raise ServerError(f"server {url} ended an answer with finish_reason {reason}")
