"""One vLLM server's connection and control plane: health, pause, sleep, and its end of a weight update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import aiohttp

from gspo_megatron.controller import vllm_format
from gspo_megatron.controller.vllm_format import FormatError, RefusedRequest, is_refusal
from gspo_megatron.http_clients import direct_session
from gspo_megatron.transport.auth import key_header
from gspo_megatron.transport.messages import ServerIdentity
from gspo_megatron.transport.server_paths import GENERATE
from gspo_megatron.transport.update_messages import JoinRequest, WorkerLayout, WorkerReport
from gspo_megatron.transport.wire_message import MessageError, WireMessage

JSON_HEADER = {"Content-Type": "application/json"}
START_VERSION = "default"
"""vLLM's own label of the weights that a server starts with."""
CONTROL_SECONDS = 120.0
"""Longest a request to the control plane may take; a dead server refuses at once, this is for one that hangs."""
KEEP_ALIVE_SECONDS = 2.0
"""Less than vLLM's 5 s: a connection that the server closes while a request is on its way looks like a dead server."""


class ServerError(RuntimeError):
    """A server that is dead, does not answer or refuses; one sentence that names it."""


class ServerAdmin:
    """One vLLM server, as far as it does not sample. Use within one event loop; `close` at the end."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self.fault = ""
        """Why this server is not used any more; empty = it is."""
        self._session = direct_session(
            key_header(key),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        )

    async def close(self) -> None:
        """Close all connections; requests in flight are dropped by the server."""
        await self._session.close()

    async def call(self, method: str, path: str, body: bytes | None = None, timeout: float | None = None) -> bytes:
        """Send one request; the body of the response. Raises as `_need_success` for any status but 200."""
        try:
            limit = aiohttp.ClientTimeout(total=timeout, sock_connect=10)
            async with self._session.request(
                method, self.url + path, data=body, headers=JSON_HEADER, timeout=limit
            ) as response:
                await self._need_success(response, path)
                return await response.read()
        except TimeoutError:
            raise ServerError(f"server {self.url} did not answer {path} within {timeout} s") from None
        except aiohttp.ClientError as error:
            raise ServerError(f"server {self.url} is gone: {type(error).__name__} on {path}") from None

    async def _need_success(self, response: aiohttp.ClientResponse, path: str) -> None:
        """Raise an error with the server's own words for any status but 200.

        Raises:
            RefusedRequest: it will not answer this prompt, and no other server would.
            ServerError: otherwise.
        """
        if response.status == 200:
            return
        reason = " ".join((await response.text()).split())[:400]
        sentence = f"server {self.url} answered {path} with {response.status}: {reason}"
        raise (RefusedRequest if path == GENERATE and is_refusal(response.status) else ServerError)(sentence)

    async def is_healthy(self) -> bool:
        """Whether the server answers its health check."""
        try:
            await self.call("GET", "/health", timeout=10)
        except ServerError:
            return False
        return True

    async def is_fresh(self) -> bool:
        """Whether a process answers here that was never given weights."""
        try:
            return vllm_format.read_version(await self.call("GET", "/weight_info", timeout=10)) == START_VERSION
        except (ServerError, FormatError):
            return False

    async def label(self, version: int) -> None:
        """Label the weights that the server started with."""
        await self.call("POST", "/update_weight_version", vllm_format.write_label(version), CONTROL_SECONDS)

    async def pause(self) -> None:
        """Stop the engine; requests are kept, their KV cache is not (vLLM's default)."""
        await self.call("POST", "/pause?mode=keep", timeout=CONTROL_SECONDS)
        if not await self.is_paused():
            raise ServerError(f"server {self.url} accepted a pause and is not paused")

    async def resume(self) -> None:
        """Let the engine run again."""
        await self.call("POST", "/resume", timeout=CONTROL_SECONDS)

    async def is_paused(self) -> bool:
        """Whether the engine is paused."""
        with self._reading("/is_paused"):
            return vllm_format.read_is_paused(await self.call("GET", "/is_paused", timeout=CONTROL_SECONDS))

    async def sleep(self) -> None:
        """Give up the memory of weights and KV; both are lost. Only for an idle server."""
        await self.call("POST", "/sleep?level=2", timeout=CONTROL_SECONDS)

    async def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        """Take memory for weights or KV again; its values are nothing yet. The engine runs once it has both."""
        await self.call("POST", f"/wake_up?tags={what}", timeout=CONTROL_SECONDS)

    async def device_names(self) -> list[str]:
        """[workers] where each one is."""
        return [reply or "" for reply in await self._worker_call("device_name", CONTROL_SECONDS)]

    async def layout(self) -> WorkerLayout:
        """How this server cuts the model."""
        return (await self._worker_messages("weight_layout", WorkerLayout, CONTROL_SECONDS))[0]

    async def identity(self) -> ServerIdentity:
        """The run that this server belongs to and what it serves; see `transport/identity.py`."""
        return (await self._worker_messages("identity", ServerIdentity, CONTROL_SECONDS))[0]

    async def reset_prefix_cache(self) -> None:
        """Forget the KV cache of earlier prompts: it belongs to the old weights."""
        await self.call("POST", "/reset_prefix_cache", timeout=CONTROL_SECONDS)

    async def receive_weights(self, request: JoinRequest, timeout: float) -> list[WorkerReport]:
        """Join the transfer group, take the model apart and receive one update; the engine must be paused.

        Returns:
            [workers] each worker's report.
        """
        try:
            await self._worker_call("forget_update", timeout)
            await self.call("POST", "/init_weight_transfer_engine", vllm_format.write_joining(request), timeout)
            # Only now: a server that could not join is whole still, one that has started is not until it has finished.
            await self.call("POST", "/start_weight_update", timeout=timeout)
            await self.call("POST", "/update_weights", vllm_format.write_reception(), timeout)
        except ServerError:
            for _ in range(2):  # a server closes the connection on which it has answered with 500
                with suppress(ServerError):
                    await self._worker_call("leave_transfer", timeout=5)
            raise
        return await self._worker_messages("weight_report", WorkerReport, timeout)

    async def _worker_messages[M: WireMessage](self, method: str, kind: type[M], timeout: float) -> list[M]:
        """[workers] what a method of `WorkerExtension` returns in each."""
        replies = await self._worker_call(method, timeout)
        with self._reading(f"/collective_rpc {method}"):
            return [kind.from_json(reply or "") for reply in replies]

    async def _worker_call(self, method: str, timeout: float) -> list[str | None]:
        """Call a method of `WorkerExtension` in every worker; [workers] the replies as text."""
        body = await self.call("POST", "/collective_rpc", vllm_format.write_worker_call(method), timeout)
        with self._reading(f"/collective_rpc {method}"):
            return vllm_format.read_worker_replies(body)

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """Turn a body that cannot be read into a ServerError."""
        try:
            yield
        except (FormatError, MessageError) as error:
            raise ServerError(f"the response of server {self.url} to {path} cannot be read: {error}") from None

    async def finish_update(self, version: int, timeout: float) -> None:
        """Put the model together and label it."""
        await self.call("POST", "/finish_weight_update", vllm_format.write_version(version), timeout)
