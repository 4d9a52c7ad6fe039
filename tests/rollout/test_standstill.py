"""A trainer rank and an engine stand still: the rank is named, and each process of the server says where it is."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gspo_megatron.cluster import watchdog
from gspo_megatron.cluster.watchdog import INTERVAL, Pulse, Watchdog
from gspo_megatron.run_dir import RunDir
from tests.rollout.conftest import Server

RANK = """
import sys
from pathlib import Path
from gspo_megatron.cluster.watchdog import Pulse, Watchdog
Watchdog(Path(sys.argv[1]), 1, 2, Pulse(), interval=0.1).run()
"""


def wait_for(there: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
        time.sleep(0.05)


def test_the_rank_that_is_behind_is_named_and_the_server_writes_its_stacks(
    server: Server, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "FIRST", 4 * INTERVAL)
    children = psutil.Process(server.process.pid).children(recursive=True)
    engine = next(child for child in children if "EngineCore" in child.cmdline()[0])
    other = subprocess.Popen([sys.executable, "-c", RANK, str(run_dir)])
    beats = RunDir(run_dir).heartbeat
    ended: list[int] = []
    try:
        wait_for((beats / "trainer-1.json").exists, "second rank")
        dog = Watchdog(run_dir, 0, 2, Pulse(), interval=0.1, end=ended.append)
        dog.start()
        time.sleep(2 * INTERVAL)
        assert not ended and "stacks of" not in server.log.read_text()
        other.send_signal(signal.SIGSTOP)
        engine.suspend()
        dog.join(60)
        assert ended == [watchdog.FAILED]
        said = server.log.read_text
        wait_for(lambda: f"process {engine.pid}" in said(), "word on the engine")
    finally:
        other.kill()
        other.wait()
        engine.resume()
    assert "trainer-1 is silent since" in capfd.readouterr().err
    told = server.log.read_text()
    own, _, _ = told.partition(f"process {engine.pid}")
    assert "stacks of rollout-0:" in own and "in serve\n" in own
    assert f"process {engine.pid} VLLM::EngineCore, T (stopped):" in told
    wait_for(lambda: "run_engine_core" in server.log.read_text(), "stack of the engine, which goes on")
    assert server.ask("GET", "/health").status_code == 200
