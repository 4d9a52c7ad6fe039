"""The trainer's connection to the controller: blocking calls of trainer rank 0. Imports neither vllm nor megatron."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from gspo_megatron.http_clients import direct_client
from gspo_megatron.transport import routes
from gspo_megatron.transport.auth import key_header
from gspo_megatron.transport.messages import (
    ControllerState,
    ControllerStatus,
    Empty,
    ErrorReply,
    EvaluationReport,
    EvaluationRequest,
    ProgressReport,
    RolloutBatch,
    RolloutRequest,
)
from gspo_megatron.transport.routes import Route
from gspo_megatron.transport.update_messages import UpdateCheck, UpdateReport, UpdateRequest, UpdateTicket
from gspo_megatron.transport.wire_message import MessageError, WireMessage

POLL_SECONDS = 0.5


class ControllerError(RuntimeError):
    """What the controller refused, or that it is gone; one sentence."""


class ControllerClient:
    """Requests to one controller. A request is sent again only if it cannot have arrived."""

    def __init__(self, url: str, key: str) -> None:
        self._client = direct_client(base_url=url, headers=key_header(key), timeout=httpx.Timeout(None, connect=5.0))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def status(self) -> ControllerStatus:
        """Phase, progress, weight version and the state of every server."""
        return self._call(routes.STATUS, Empty())

    def wait_ready(self, timeout: float, on_status: Callable[[ControllerStatus], None] = lambda status: None) -> None:
        """Wait until the controller and all its servers are ready. Raises ControllerError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        phase = "the controller does not answer"
        while time.monotonic() < deadline:
            try:
                status = self.status()
            except ControllerError as error:
                phase = str(error)
            else:
                on_status(status)
                phase = status.phase
                if phase == "idle":
                    return
                if phase.startswith("failed: "):
                    raise ControllerError(phase.removeprefix("failed: "))
            time.sleep(POLL_SECONDS)
        raise ControllerError(f"after {timeout:g} s the rollout is not ready: {phase}")

    def rollout(
        self, request: RolloutRequest, on_progress: Callable[[ProgressReport], None] = lambda progress: None
    ) -> RolloutBatch:
        """Sample one batch; `on_progress` is called about twice a second."""
        return self._watched(routes.ROLLOUT, request, on_progress)

    def evaluate(
        self, request: EvaluationRequest, on_progress: Callable[[ProgressReport], None] = lambda progress: None
    ) -> EvaluationReport:
        """Score held-out problems; `on_progress` is called about twice a second."""
        return self._watched(routes.EVALUATE, request, on_progress)

    def begin_update(self, request: UpdateRequest) -> UpdateTicket:
        """Pause the servers and let them receive; with the ticket every trainer rank calls `WeightSender.send`."""
        return self._call(routes.BEGIN_UPDATE, request)

    def finish_update(self, request: UpdateCheck) -> UpdateReport:
        """Have the servers check the new weights and serve with them."""
        return self._call(routes.FINISH_UPDATE, request)

    def sleep(self) -> None:
        """Let the servers give up the memory of their devices; the next update wakes them."""
        self._call(routes.SLEEP, Empty())

    def state(self) -> ControllerState:
        """The controller's part of a checkpoint."""
        return self._call(routes.READ_STATE, Empty())

    def restore(self, state: ControllerState) -> None:
        """Let the controller continue from a checkpoint."""
        self._call(routes.RESTORE_STATE, state)

    def _watched[Q: WireMessage, R: WireMessage](
        self, route: Route[Q, R], request: Q, on_progress: Callable[[ProgressReport], None]
    ) -> R:
        """Send a long request from another thread, and report its progress from this one."""
        finished = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(self._call, route, request)
            call.add_done_callback(lambda _: finished.set())
            while not finished.wait(POLL_SECONDS):
                on_progress(self.status().progress)
            response = call.result()
        on_progress(self.status().progress)
        return response

    def _call[Q: WireMessage, R: WireMessage](self, route: Route[Q, R], request: Q) -> R:
        retrying = Retrying(
            retry=retry_if_exception_type((httpx.ConnectError, httpx.ConnectTimeout)),
            stop=stop_after_attempt(4),
            wait=wait_exponential(multiplier=0.1, max=1.0),
            reraise=True,
        )
        body = request.to_json().encode() if route.method == "POST" else None
        try:
            response = retrying(
                self._client.request,
                route.method,
                route.path,
                content=body,
                headers={"Content-Type": "application/json"},
            )
        except httpx.TransportError as error:
            address = str(self._client.base_url).rstrip("/")
            raise ControllerError(
                f"the controller at {address} is gone: {type(error).__name__} on {route.path}"
            ) from None
        try:
            if response.status_code == 200:
                return route.response.from_json(response.content)
        except MessageError as error:
            raise ControllerError(f"the response to {route.path} cannot be read: {error}") from None
        try:
            sentence = ErrorReply.from_json(response.content).error
        except MessageError:
            sentence = f"the controller answered {route.path} with {response.status_code}; its log says why"
        raise ControllerError(sentence)
