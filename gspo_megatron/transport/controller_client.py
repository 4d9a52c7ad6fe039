"""The trainer's line to the controller: blocking calls of trainer rank 0. Imports neither vllm nor megatron."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.data.store import read_ref
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.auth import key_header

Listener = Callable[[dict[str, Any]], None]
POLL_SECONDS = 0.5


class ControllerError(RuntimeError):
    """What the controller refused, or that it is gone; one sentence."""


class ControllerClient:
    """Requests to one controller. A request is sent again only if it cannot have arrived."""

    def __init__(self, url: str, key: str) -> None:
        self._client = httpx.Client(base_url=url, headers=key_header(key), timeout=httpx.Timeout(None, connect=5.0))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def status(self) -> dict[str, Any]:
        """`phase`, `progress` {done, total, tokens, seconds}, `version`, `servers` {address: fault or empty}."""
        return self._call("GET", "/status")

    def wait_ready(self, timeout: float, on_status: Listener = lambda status: None) -> None:
        """Wait until the controller answers and all its servers do. Raises ControllerError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        said = "the controller does not answer"
        while time.monotonic() < deadline:
            try:
                status = self.status()
            except ControllerError as error:
                said = str(error)
            else:
                on_status(status)
                said = str(status["phase"])
                if said == "idle":
                    return
                if said.startswith("failed: "):
                    raise ControllerError(said.removeprefix("failed: "))
            time.sleep(POLL_SECONDS)
        raise ControllerError(f"after {timeout:g} s the rollout is not ready: {said}")

    def rollout(self, step: int, on_progress: Listener = lambda progress: None) -> dict[str, Any]:
        """Sample one batch.

        Args:
            step: the training step it is for.
            on_progress: called about twice a second with `{done, total, tokens, seconds}`.

        Returns:
            `samples` (list of SampleRef, ordered by prompt and sample), `seconds`, `tokens`, `accounting`.
        """
        answer = self._watched("/rollout", {"step": step}, on_progress)
        answer["samples"] = [read_ref(row) for row in answer["samples"]]
        return answer

    def evaluate(
        self, problems: int, answers: int = 1, temperature: float = 0.0, on_progress: Listener = lambda progress: None
    ) -> dict[str, Any]:
        """Score held-out problems.

        Returns:
            `accuracy` (share of full scores), `mean_reward`, `mean_length` in tokens, and three `examples`
            {question, answer_text, reward}.
        """
        body = {"problems": problems, "answers": answers, "temperature": temperature}
        return self._watched("/evaluate", body, on_progress)

    def begin_update(
        self, version: int, arch: Architecture, dtype: str, layout: Layout, devices: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Pause the servers and let them receive.

        Args:
            version: of the weights that are sent.
            arch: the model.
            dtype: of all its weights: `bfloat16`.
            layout: of the trainer ranks.
            devices: [trainer ranks] where each one is (`handover.device_name`), if servers share their devices.

        Returns:
            The ticket with which every trainer rank calls `WeightSender.send`.
        """
        terms = {"architecture": arch.model_dump(), "dtype": dtype, "trainer": asdict(layout)}
        body = {"version": version, "terms": terms, "devices": list(devices)}
        return self._call("POST", "/weights/begin", body)

    def sleep(self) -> None:
        """Let the servers give up the memory of their devices; the next update wakes them."""
        self._call("POST", "/sleep", {})

    def finish_update(
        self, version: int, checksums: Sequence[int], probes: Sequence[tuple[Sequence[int], Sequence[float]]]
    ) -> dict[str, Any]:
        """Have the servers check and take the new weights.

        Args:
            version: as at `begin_update`.
            checksums: what `WeightSender.send` returned, added up over the trainer ranks modulo 2**64.
            probes: token ids [length] and the trainer's log-probs at temperature 1 of ids[1:], [length - 1].

        Returns:
            `largest` and `mean` |log-prob difference|, `seconds`, `transfer_seconds`, `received_over_needed`,
            `servers` by address.
        """
        rows = [{"token_ids": [int(i) for i in ids], "logprobs": [float(x) for x in scores]} for ids, scores in probes]
        return self._call("POST", "/weights/finish", {"version": version, "checksums": list(checksums), "probes": rows})

    def state(self) -> dict[str, Any]:
        """The controller's part of a checkpoint."""
        return self._call("GET", "/state")

    def restore(self, state: dict[str, Any]) -> None:
        """Let the controller go on from a checkpoint."""
        self._call("POST", "/state", state)

    def _watched(self, path: str, body: dict[str, Any], on_progress: Listener) -> dict[str, Any]:
        """A long call in a thread, while this one tells how far it is."""
        finished = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(self._call, "POST", path, body)
            call.add_done_callback(lambda _: finished.set())
            while not finished.wait(POLL_SECONDS):
                on_progress(self.status()["progress"])
            answer = call.result()
        on_progress(self.status()["progress"])
        return answer

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        retrying = Retrying(
            retry=retry_if_exception_type((httpx.ConnectError, httpx.ConnectTimeout)),
            stop=stop_after_attempt(4),
            wait=wait_exponential(multiplier=0.1, max=1.0),
            reraise=True,
        )
        try:
            response = retrying(self._client.request, method, path, json=body)
        except httpx.TransportError as error:
            address = str(self._client.base_url).rstrip("/")
            raise ControllerError(f"the controller at {address} is gone: {type(error).__name__} on {path}") from None
        if response.status_code == 200:
            return response.json()
        try:
            sentence = response.json()["error"]
        except ValueError:
            sentence = f"the controller answered {path} with {response.status_code}; its log says why"
        raise ControllerError(sentence)


def count_ready(status: dict[str, Any]) -> int:
    """Servers that answered their health check, by the controller's status."""
    return sum(not fault for fault in status["servers"].values()) if status["phase"] == "idle" else 0
