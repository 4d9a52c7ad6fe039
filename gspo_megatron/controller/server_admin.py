"""One vLLM server's connection and control plane: health, pause, sleep, and its end of a weight update."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal

import aiohttp

from gspo_megatron.models.vllm_layout import ServerLayout
from gspo_megatron.transport.auth import key_header

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
                await self._need_success(response, path)
                return await response.json() if response.content_type == "application/json" else await response.read()
        except TimeoutError:
            raise ServerError(f"server {self.url} did not answer {path} within {timeout} s") from None
        except aiohttp.ClientError as error:
            raise ServerError(f"server {self.url} is gone: {type(error).__name__} on {path}") from None

    async def _need_success(self, response: aiohttp.ClientResponse, path: str) -> None:
        """Raise ServerError with the server's own words unless it answered with a 200."""
        if response.status != 200:
            reason = " ".join((await response.text()).split())[:400]
            raise ServerError(f"server {self.url} answered {path} with {response.status}: {reason}")

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
            return (await self.call("GET", "/weight_info", timeout=10)).get("weight_version") == START_VERSION
        except ServerError:
            return False

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

    async def sleep(self) -> None:
        """Give up the memory of weights and KV; both are lost. Only an idle server may be asked."""
        await self.call("POST", "/sleep?level=2", timeout=CONTROL_SECONDS)

    async def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        """Take memory for weights or KV again; its values are nothing yet. The engine runs once it has both."""
        await self.call("POST", f"/wake_up?tags={what}", timeout=CONTROL_SECONDS)

    async def device_names(self) -> list[str]:
        """[workers] where each one is."""
        return await self._worker_call("device_name", CONTROL_SECONDS)

    async def layout(self) -> ServerLayout:
        """How this server cuts the model."""
        return ServerLayout(**(await self._worker_call("weight_layout", CONTROL_SECONDS))[0])

    async def identity(self) -> dict[str, Any]:
        """Whose this server is and what it serves; see `identity.py`."""
        return (await self._worker_call("identity", CONTROL_SECONDS))[0]

    async def reset_prefix_cache(self) -> None:
        """Forget the KV cache of earlier prompts: it belongs to the old weights."""
        await self.call("POST", "/reset_prefix_cache", timeout=CONTROL_SECONDS)

    async def receive_weights(self, ticket: dict[str, Any], first_worker: int, timeout: float) -> list[dict[str, Any]]:
        """Join the transfer group, take the model apart and receive one update; the engine must be paused.

        Returns:
            Each worker's report: `checksum` (decimal text), `seconds`, `received_bytes`, `needed_bytes`, or `fault`.
        """
        try:
            await self._worker_call("forget_update", timeout)
            joining = {"init_info": {"ticket": ticket, "first_worker": first_worker}}
            await self.call("POST", "/init_weight_transfer_engine", joining, timeout)
            # Only now: a server that could not join is whole still, one that has started is not until it has finished.
            await self.call("POST", "/start_weight_update", timeout=timeout)
            await self.call("POST", "/update_weights", {"update_info": {}}, timeout)
        except ServerError:
            for _ in range(2):  # a server closes the connection on which it has answered with 500
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
