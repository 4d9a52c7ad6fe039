"""An asynchronous client of one vLLM server: token ids in, token ids and log-probs out.

Whatever would kill the server or be cut silently (an id outside the vocabulary, a length beyond the context) is
refused here, before it is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress

import aiohttp

from gspo_megatron.controller import vllm_format
from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.server_admin import CONTROL_SECONDS, ServerAdmin, ServerError
from gspo_megatron.controller.token_reception import Outbox, Reception
from gspo_megatron.controller.vllm_format import Ending, RefusedRequest
from gspo_megatron.transport.server_paths import GENERATE
from gspo_megatron.transport.token_frames import Frame, FrameError, FrameReader, SamplingRequest, write_requests
from gspo_megatron.types import StopReason

STALL_SECONDS = 300.0
"""A server that holds requests and yields neither a token nor an answer for so long is taken for dead."""
ABORT = "/inference/v1/abort_requests"
"""vLLM's own."""
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
        self._receptions: set[Reception] = set()
        self._outbox = Outbox(self._send)
        self._tasks: set[asyncio.Task[None]] = set()

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
        now = version()
        assert now is not None, "nothing may be sampled while the weights change"
        label, certain = now, start

        def take(frame: Frame) -> None:
            nonlocal label, certain
            if frame.routes is not None:
                generation.routes.extend(frame.routes)
            # A frame was started when the one before it came: at worst it is labelled as too old.
            generation.extend(frame.token_ids, frame.logprobs, label)
            generation.received(len(frame.token_ids))
            label = label if (now := version()) is None else now
            certain = certain if now is None else len(generation)

        request = vllm_format.sampling_request(generation, sampling, left)
        generation.parts += 1
        self.generations.add(generation)
        try:
            ending = await self._ask(request, take)
            self._check_routes(generation, sampling, start)
        except ServerError:
            generation.cut(certain)
            raise
        finally:
            self.generations.discard(generation)
        generation.relabel(start, ending.segments)
        return _stop_reason(ending.finish_reason, self.url)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of token_ids[1:] under the server's weights at temperature 1, [length - 1]."""
        self.check(token_ids, 1)
        scores: list[float] = []
        await self._ask(vllm_format.scoring_request(token_ids), lambda frame: scores.extend(frame.logprobs))
        return scores

    def _check_routes(self, generation: Generation, sampling: Sampling, start: int) -> None:
        """Raise ServerError unless every token but the last has its routes, where they are asked for."""
        wanted = len(generation.prompt.token_ids) + len(generation) - 1
        if sampling.routes and len(generation) > start and len(generation.routes) != wanted:
            raise ServerError(f"server {self.url} sent routes of {len(generation.routes)} tokens instead of {wanted}")

    async def _ask(self, request: SamplingRequest, take: Callable[[Frame], None]) -> Ending:
        """Send a request with others of its time, and take in what comes until it ends.

        Raises:
            ServerError: the server died, or was given up by `watch`.
            RefusedRequest: it will not answer this request.
        """
        if self.fault:
            raise ServerError(self.fault)
        reception = Reception(request, self.url, take)
        self._receptions.add(reception)
        self._outbox.add(reception)
        try:
            return await reception.ended
        except asyncio.CancelledError:
            if not reception.is_over:
                self._start(self._give_up(reception))
            raise
        finally:
            self._receptions.discard(reception)

    def _send(self, receptions: Sequence[Reception]) -> None:
        self._start(self._stream(receptions))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stream(self, receptions: Sequence[Reception]) -> None:
        """Ask for several responses with one message, and hand out the frames that come."""
        error: ServerError | RefusedRequest = ServerError(f"server {self.url} broke off an answer")
        try:
            body = write_requests([reception.request for reception in receptions])
            limit = aiohttp.ClientTimeout(sock_connect=10)
            async with self._session.post(self.url + GENERATE, data=body, timeout=limit) as response:
                await self._need_success(response, GENERATE)
                reader = FrameReader()
                async for data in response.content.iter_any():
                    for frame in reader.feed(data):
                        receptions[frame.number].receive(frame)
        # A dying engine ends its streams in any of these ways.
        except (aiohttp.ClientError, FrameError, IndexError) as fault:
            reason = str(fault) if isinstance(fault, FrameError) else type(fault).__name__
            error = ServerError(f"server {self.url} is gone: {reason} on {GENERATE}")
        except (ServerError, RefusedRequest) as fault:
            error = fault
        finally:
            for reception in receptions:
                reception.fail(error)

    async def _give_up(self, reception: Reception) -> None:
        """Have the server forget a request for which nobody waits; one that was on its way is asked for again."""
        body = vllm_format.write_abort([reception.request.request_id])
        with suppress(ServerError):
            while not reception.is_over and not self.fault:
                await self.call("POST", ABORT, body, CONTROL_SECONDS)
                await asyncio.sleep(ABORT_SECONDS)

    async def close(self) -> None:
        """Close all connections; requests in flight are dropped by the server."""
        for task in self._tasks:
            task.cancel()
        await super().close()

    async def interrupt(self) -> None:
        """Interrupt all generations in flight; they keep what was sampled."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + CONTROL_SECONDS
        while True:
            await self.call("POST", "/pause?mode=abort", timeout=CONTROL_SECONDS)
            settled = clock() + ABORT_SECONDS
            while self._receptions and clock() < settled:
                await asyncio.sleep(0.01)
            await self.resume()
            if not self._receptions:
                return
            # A request that was on its way came in after the abort and was held: it needs another one.
            if clock() > deadline:
                raise ServerError(f"server {self.url} holds {len(self._receptions)} requests that it was asked to end")

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
            if tokens != seen or not self._receptions:
                seen, since = tokens, clock()
            elif clock() - since > stall_seconds:
                waiting = len(self._receptions)
                self.fault = f"server {self.url} made no progress on {waiting} answers for {stall_seconds:g} s"
                for task in self._tasks:
                    task.cancel()
                for reception in self._receptions:
                    reception.fail(ServerError(self.fault))


def _stop_reason(reason: str | None, url: str) -> StopReason:
    if reason == "stop" or reason == "length" or reason == "repetition" or reason == "abort":
        return reason
    raise ServerError(f"server {url} ended an answer with finish_reason {reason}")
