"""One vLLM server for all tests of this folder, and a controller in a thread for each test that wants one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from gspo_megatron.cluster.free_ports import free_ports
from gspo_megatron.config.loading import save_resolved
from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.api import Service
from gspo_megatron.controller.controller import Controller
from gspo_megatron.controller.environment_pool import EnvironmentPool
from gspo_megatron.controller.multi_turn import Thinking
from gspo_megatron.controller.process_pool import ProcessPool
from gspo_megatron.controller.server_client import ServerClient
from gspo_megatron.controller.servers import ServerSet
from gspo_megatron.data.store import SampleStore
from gspo_megatron.models import load_resolved
from gspo_megatron.transport.auth import KEY_VARIABLE, key_header
from gspo_megatron.transport.controller_client import ControllerClient
from gspo_megatron.transport.identity import Identity
from tests.rollout.jobs import SERVER
from tests.rollout.scorer import make_scorer
from tests.rollout.tiny import KEY, VOCAB, CountingPrompts, NumberTokenizer, Oracle, make_recipe, write_config
from tests.waiting import HANG, wait_until

ENDS_SERVER = "test_death.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test that kills the server comes last in this folder."""
    here = [place for place, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    ordered = sorted((items[place] for place in here), key=lambda item: item.path.name == ENDS_SERVER)
    for place, item in zip(here, ordered, strict=True):
        items[place] = item


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    parts: tuple[subprocess.Popen[bytes], ...] = ()
    """Where it spans nodes: the processes of the others."""

    def answers(self) -> bool:
        return answers(self.url)

    def assert_lives(self) -> None:
        ended = [process for process in (self.process, *self.parts) if process.poll() is not None]
        assert not ended, self.log.read_text()[-2000:]

    def ask(self, method: str, path: str, key: str = KEY) -> httpx.Response:
        return httpx.request(method, self.url + path, headers=key_header(key), timeout=HANG)


def server_command(run_dir: Path, port: int, *more: str, module: str = SERVER) -> list[str]:
    where = ["--run-dir", str(run_dir), "--index", "0", "--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", module, *where, *more]


def make_run_dir(directory: Path, server_nodes: int | None = None, replay: str = "off", **rollout: Any) -> Path:
    """A run directory that a server can start from, with some keys of `rollout` changed."""
    recipe = make_recipe()
    sections = {
        "rollout": recipe.rollout.model_copy(update=rollout),
        "placement": recipe.placement.model_copy(update={"server_nodes": server_nodes}),
        "objective": recipe.objective.model_copy(update={"replay": replay}),
    }
    return save_run(directory, recipe.model_copy(update=sections))


def save_run(directory: Path, recipe: Recipe) -> Path:
    """What a server reads of a run directory."""
    directory.mkdir(parents=True, exist_ok=True)
    save_resolved(recipe, directory / "recipe.resolved.yaml")
    write_config(directory / "model", recipe.arch)
    return directory


@contextmanager
def running_servers(*run_dirs: Path, module: str = SERVER) -> Iterator[list[Server]]:
    """One healthy server for each run directory; they start side by side."""
    servers: list[Server] = []
    try:
        for run_dir in run_dirs:
            servers.append(start_server(run_dir, module))
        for server in servers:
            wait_until(server.answers, f"server at {server.url}", server.assert_lives)
        yield servers
    finally:
        for process in [process for server in servers for process in (server.process, *server.parts)]:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


def start_server(run_dir: Path, module: str) -> Server:
    """Start one server; the parts of one that spans nodes run side by side here."""
    nodes = load_resolved(run_dir / "recipe.resolved.yaml").placement.server_nodes or 1
    environment = {**os.environ, KEY_VARIABLE: KEY, "VLLM_HOST_IP": "127.0.0.1"}
    (port, meeting), log = free_ports(2), run_dir / "server.log"
    processes = []
    with log.open("wb") as output:
        for part in range(nodes):
            place = ("--part", str(part), "--of", str(nodes), "--meet", f"127.0.0.1:{meeting}") if nodes > 1 else ()
            processes.append(
                subprocess.Popen(
                    server_command(run_dir, port, *place, module=module),
                    env=environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )
    return Server(f"http://127.0.0.1:{port}", processes[0], log, tuple(processes[1:]))


@pytest.fixture(scope="package")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_dir(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="package")
def server(run_dir: Path) -> Iterator[Server]:
    with running_servers(run_dir) as servers:
        yield servers[0]


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=HANG).status_code == 200
    except httpx.TransportError:
        return False


class ControllerThread:
    """A controller of its own event loop, reached through its HTTP interface."""

    def __init__(
        self,
        server_urls: Sequence[str],
        samples: Path,
        recipe: Recipe | None = None,
        overlaps: bool = True,
        sleeps: bool = False,
        slots: int = 64,
        identity: Identity | None = None,
        thinking: Thinking | None = None,
        environment: EnvironmentPool | None = None,
    ) -> None:
        self.url = ""
        self.store = SampleStore(samples)
        self.server_urls = server_urls
        self._recipe, self._sharing, self._slots = recipe or make_recipe(), (overlaps, sleeps), slots
        self._identity, self._thinking, self._environment = identity, thinking, environment
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._done = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))
        self._thread.start()
        assert self._ready.wait(HANG)

    async def _serve(self) -> None:
        servers = ServerSet(
            [ServerClient(url, KEY, VOCAB, 64, self._slots) for url in self.server_urls], self._identity
        )
        scoring = ProcessPool(make_scorer, 1, 5.0, "scorer")
        parts = (CountingPrompts(), NumberTokenizer(), scoring, self.store, "127.0.0.1", *self._sharing)
        self.controller = Controller(self._recipe, servers, *parts, self._thinking, self._environment)
        runner = web.AppRunner(Service(self.controller, KEY).application())
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = "http://{}:{}".format(*runner.addresses[0][:2])
        self._ready.set()
        await self._done.wait()
        await runner.cleanup()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(HANG)
        self._loop.close()


Starter = Callable[..., tuple[ControllerThread, ControllerClient]]


def open_controller(
    stack: ExitStack, servers: Sequence[Server], *given: Any, **how: Any
) -> tuple[ControllerThread, ControllerClient]:
    """A controller of some servers that is ready, and its client; the stack ends both."""
    controller = ControllerThread([server.url for server in servers], *given, **how)
    stack.callback(controller.stop)
    client = ControllerClient(controller.url, KEY)
    stack.callback(client.close)
    client.wait_ready(HANG)
    return controller, client


@pytest.fixture
def start_controller(server: Server, tmp_path: Path) -> Iterator[Starter]:
    """Starts a controller that is ready; it knows nothing of what earlier ones did to the servers."""
    with ExitStack() as stack:

        def start(*others: Server, **how: Any) -> tuple[ControllerThread, ControllerClient]:
            return open_controller(stack, (server, *others), tmp_path / "samples", **how)

        yield start


@pytest.fixture(scope="package")
def oracles() -> list[Oracle]:
    return [Oracle(seed) for seed in (0, 1)]
