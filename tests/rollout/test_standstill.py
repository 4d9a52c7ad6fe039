"""A trainer rank and an engine stand still: the rank is named, and each process of the server says where it is."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gspo_megatron.cluster import watchdog
from gspo_megatron.cluster.watchdog import SILENT, Pulse, Watchdog
from gspo_megatron.run_dir import RunDir
from tests.rollout.conftest import Server
from tests.waiting import HANG, wait_until

RANK = """
import sys
from pathlib import Path
from gspo_megatron.cluster.watchdog import Pulse, Watchdog
Watchdog(Path(sys.argv[1]), 1, 2, Pulse(), interval=0.1).run()
"""


def test_the_rank_that_is_behind_is_named_and_the_server_writes_its_stacks(
    server: Server, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    children = psutil.Process(server.process.pid).children(recursive=True)
    engine = next(child for child in children if "EngineCore" in child.cmdline()[0])
    other = subprocess.Popen([sys.executable, "-c", RANK, str(run_dir)])
    beats = RunDir(run_dir).heartbeat
    ended: list[int] = []
    try:
        wait_until((beats / "trainer-1.json").exists, "second rank")
        dog = Watchdog(run_dir, 0, 2, Pulse(), interval=0.1, end=ended.append)
        dog.start()
        started = time.time()
        wait_until(
            lambda: len(dog.read()) == 2 and min(b.written for b in dog.read().values()) > started, "look of both"
        )
        assert not ended and "stacks of" not in server.log.read_text()
        other.send_signal(signal.SIGSTOP)
        engine.suspend()
        wait_until(lambda: time.time() - dog.read()[1].written > SILENT, "silence of the second rank")
        monkeypatch.setattr(watchdog, "FIRST", 0.1)
        dog.join(HANG)
        assert ended == [watchdog.FAILED]
        said = server.log.read_text
        wait_until(lambda: f"process {engine.pid}" in said(), "word on the engine")
    finally:
        other.kill()
        other.wait()
        engine.resume()
    assert "trainer-1 is silent since" in capfd.readouterr().err
    reported = server.log.read_text()
    own, _, _ = reported.partition(f"process {engine.pid}")
    assert "stacks of rollout-0:" in own and "in serve\n" in own
    assert f"process {engine.pid} VLLM::EngineCore, T (stopped):" in reported
    wait_until(lambda: "run_engine_core" in server.log.read_text(), "stack of the engine, which goes on")
    assert server.ask("GET", "/health").status_code == 200
