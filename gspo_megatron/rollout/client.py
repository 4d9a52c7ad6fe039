"""An asynchronous client of one vLLM server: token ids in, token ids and log-probs out, and the control plane.

Whatever would kill the server or be cut silently (an id outside the vocabulary, a length beyond the context) is
refused here, before it is sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from gspo_megatron.rollout.auth import key_header
from gspo_megatron.types import Answer, Prompt, Segment, StopReason
from gspo_megatron.weights.server_layout import ServerLayout

GENERATED_TOKENS = re.compile(rb"^vllm:generation_tokens_total\{[^}]*\} ([0-9.e+]+)", re.MULTILINE)
STALL_SECONDS = 300.0
"""A server that holds requests and yields neither a token nor an answer for so long is taken for dead."""
CONTROL_SECONDS = 120.0
"""Longest a request to the control plane may take; a dead server refuses at once, this is for one that hangs."""
KEEP_ALIVE_SECONDS = 2.0
"""Less than vLLM's 5 s: a connection that the server closes while a request is on its way looks like a dead server."""


class ServerError(RuntimeError):
    """A server that is dead, does not answer or refuses; one sentence that names it."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn."""

    temperature: float
    """0 = greedy."""
    max_tokens: int
    """Longest answer, stop token included."""
    stop_ids: tuple[int, ...]
    """Token ids that end an answer."""
    seed: int
    """The run's seed; every answer derives its own from it."""


def answer_seed(seed: int, prompt_index: int, sample_index: int, segment: int) -> int:
    """Seed of one segment of one answer: a continued answer must not replay the random stream of its first part."""
    text = f"{seed}/{prompt_index}/{sample_index}/{segment}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


class ServerClient:
    """One vLLM server. Use within one event loop; `close` at the end."""

    def __init__(self, url: str, key: str, vocab_size: int, context: int, concurrency: int) -> None:
        self.url = url.rstrip("/")
        self.vocab_size = vocab_size
        self.context = context
        self.fault = ""
        """Why this server is not used any more; empty = it is."""
        self._requests: set[asyncio.Future[Any]] = set()
        self._slots = asyncio.Semaphore(concurrency)
        self._session = aiohttp.ClientSession(
            headers=key_header(key),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        )

    async def close(self) -> None:
        """Close all connections; requests in flight are dropped by the server."""
        await self._session.close()

    async def call(self, method: str, path: str, body: Any = None, timeout: float | None = None) -> Any:
        """One request; the decoded answer. Raises ServerError for anything but a 200."""
        try:
            limit = aiohttp.ClientTimeout(total=timeout, sock_connect=10)
            async with self._session.request(method, self.url + path, json=body, timeout=limit) as response:
                if response.status != 200:
                    reason = " ".join((await response.text()).split())[:400]
                    raise ServerError(f"server {self.url} answered {path} with {response.status}: {reason}")
                return await response.json() if response.content_type == "application/json" else await response.read()
        except TimeoutError:
            raise ServerError(f"server {self.url} did not answer {path} within {timeout} s") from None
        except aiohttp.ClientError as error:
            raise ServerError(f"server {self.url} is gone: {type(error).__name__} on {path}") from None

    async def is_healthy(self) -> bool:
        """Whether the server answers its health check."""
        try:
            await self.call("GET", "/health", timeout=10)
        except ServerError:
            return False
        return True

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

    async def generate(self, prompt: Prompt, sample_index: int, sampling: Sampling) -> Answer:
        """Sample one answer. Raises ServerError if the server dies, ValueError for a prompt that it must not see."""
        self.check(prompt.token_ids, sampling.max_tokens)
        greedy = sampling.temperature == 0
        parameters: dict[str, Any] = {
            "n": 1,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop_ids),
            # Only the ids above stop: a model's own end-of-text id may differ from the tokenizer's.
            "ignore_eos": True,
            "detokenize": False,
            "seed": answer_seed(sampling.seed, prompt.index, sample_index, 0),
        }
        if not greedy:
            parameters["logprobs"] = 0
        choice = await self._submit(
            {
                "request_id": f"{prompt.index}-{sample_index}-{'greedy' if greedy else 'sampled'}",
                "token_ids": list(prompt.token_ids),
                "sampling_params": parameters,
            }
        )
        logprobs = [] if greedy else [entry["logprob"] for entry in choice["logprobs"]["content"]]
        return Answer(
            prompt_index=prompt.index,
            sample_index=sample_index,
            token_ids=np.asarray(choice["token_ids"], np.int32),
            logprobs=np.asarray(logprobs, np.float32),
            segments=read_segments(choice["weight_versions"]),
            stop_reason=_stop_reason(choice["finish_reason"], self.url),
        )

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of token_ids[1:] under the server's weights at temperature 1, [length - 1]."""
        self.check(token_ids, 1)
        body = {
            "token_ids": list(token_ids),
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False},
        }
        answer = await self.call("POST", "/inference/v1/generate", body, timeout=STALL_SECONDS)
        rows = answer["prompt_logprobs"][1:]
        return [float(row[str(token)]["logprob"]) for row, token in zip(rows, token_ids[1:], strict=True)]

    async def _submit(self, body: dict[str, Any]) -> dict[str, Any]:
        async with self._slots:
            if self.fault:
                raise ServerError(self.fault)
            request = asyncio.ensure_future(self.call("POST", "/inference/v1/generate", body))
            self._requests.add(request)
            try:
                return (await request)["choices"][0]
            except asyncio.CancelledError:
                if self.fault:
                    raise ServerError(self.fault) from None
                raise
            finally:
                self._requests.discard(request)

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
            if tokens != seen or not self._requests:
                seen, since = tokens, clock()
            elif clock() - since > stall_seconds:
                waiting = len(self._requests)
                self.fault = f"server {self.url} made no progress on {waiting} answers for {stall_seconds:g} s"
                for request in self._requests:
                    request.cancel()

    async def pause(self) -> None:
        """Stop the engine; requests are kept, their KV cache is not (vLLM's default)."""
        await self.call("POST", "/pause?mode=keep", timeout=CONTROL_SECONDS)
        if not await self.is_paused():
            raise ServerError(f"server {self.url} accepted a pause and is not paused")

    async def resume(self) -> None:
        """Let the engine run again."""
        await self.call("POST", "/resume", timeout=CONTROL_SECONDS)

    async def is_paused(self) -> bool:
        """Whether the engine stands still."""
        return bool((await self.call("GET", "/is_paused", timeout=CONTROL_SECONDS))["is_paused"])

    async def layout(self) -> ServerLayout:
        """How this server cuts the model."""
        return ServerLayout(**(await self._worker_call("weight_layout", CONTROL_SECONDS))[0])

    async def reset_prefix_cache(self) -> None:
        """Forget the KV cache of earlier prompts: it belongs to the old weights."""
        await self.call("POST", "/reset_prefix_cache", timeout=CONTROL_SECONDS)

    async def receive_weights(self, ticket: dict[str, Any], first_worker: int, timeout: float) -> list[dict[str, Any]]:
        """Join the transfer group, take the model apart and receive one update; the engine must be paused.

        Returns:
            Each worker's report: `checksum` (decimal text), `tensors`, `seconds`, `received_bytes`, `needed_bytes`.
        """
        try:
            await self._worker_call("forget_update", timeout)
            joining = {"init_info": {"ticket": ticket, "first_worker": first_worker}}
            await self.call("POST", "/init_weight_transfer_engine", joining, timeout)
            # Only now: a server that could not join is whole still, one that has started is not until it has finished.
            await self.call("POST", "/start_weight_update", timeout=timeout)
            await self.call("POST", "/update_weights", {"update_info": {}}, timeout)
        except ServerError:
            with suppress(ServerError):
                await self._worker_call("leave_transfer", timeout=5)
            raise
        return await self._worker_call("weight_report", timeout)

    async def _worker_call(self, method: str, timeout: float) -> list[Any]:
        """Call a method of `worker.WorkerExtension` in every worker; their answers."""
        return (await self.call("POST", "/collective_rpc", {"method": method}, timeout))["results"]

    async def finish_update(self, version: int, timeout: float) -> None:
        """Put the model together and label it."""
        await self.call("POST", "/finish_weight_update", {"weight_version": str(version)}, timeout)


def read_segments(spans: Sequence[dict[str, Any]]) -> tuple[Segment, ...]:
    """vLLM's version spans as segments; the label is the version as text."""
    return tuple(Segment(int(span["version"]), span["start"], span["end"]) for span in spans)


def _stop_reason(reason: str | None, url: str) -> StopReason:
    if reason == "stop" or reason == "length" or reason == "repetition" or reason == "abort":
        return reason
    raise ServerError(f"server {url} ended an answer with finish_reason {reason}")
