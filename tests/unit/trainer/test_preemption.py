"""A run stops when it is asked to, and before its time is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gspo_megatron.cluster.slurm_backend import TASK_LINE
from gspo_megatron.trainer import preemption
from gspo_megatron.trainer.preemption import END_TIME, StopRequest
from tests.unit.trainer.lone_rank import TRAINER
from tests.waiting import HANG

NOW = 1000.0


class Clock:
    """Stands in for `time` within the module: a test moves it."""

    now = NOW

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(preemption, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def no_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(END_TIME, raising=False)
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_a_run_without_a_limit_goes_on_until_it_is_asked() -> None:
    request = StopRequest()
    assert not request.is_raised(TRAINER, 1e6)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert request.is_raised(TRAINER, 0.0)


@pytest.mark.parametrize(
    ("left", "save_seconds", "stops"),
    [
        (35.0, 1.0, False),  # a step of nothing, a save twice, and the margin
        (31.0, 1.0, True),
        (45.0, 10.0, True),
        (200.0, 0.0, True),  # no save was measured yet
        (300.0, 0.0, False),
    ],
)
def test_the_next_step_and_its_save_must_fit(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, left: float, save_seconds: float, stops: bool
) -> None:
    monkeypatch.setenv(END_TIME, str(clock.now + left))
    assert StopRequest().is_raised(TRAINER, save_seconds) is stops


def test_the_slowest_step_counts(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setenv(END_TIME, str(NOW + 50.0))
    request = StopRequest()
    clock.now += 5.0
    assert not request.is_raised(TRAINER, 1.0), "5 s of a step, 2 of two saves and 30 of margin fit into 45"
    clock.now += 7.0
    assert not request.is_raised(TRAINER, 0.1), "7 s, 0.2 and 30 fit into 38"
    clock.now += 0.9
    assert request.is_raised(TRAINER, 0.1), "a quick step does not make the slow one forgotten: 37.1 are left for 37.2"


TASK = """
import os, signal, sys
print(signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)
os.kill(os.getpid(), signal.SIGUSR1)  # before torch, handlers and everything
from gspo_megatron.trainer.preemption import StopRequest
from tests.unit.trainer.lone_rank import TRAINER
print(StopRequest().is_raised(TRAINER, 0.0))
"""


def test_a_signal_in_the_first_moment_of_a_task_is_kept(tmp_path: Path) -> None:
    role = {"kind": "trainer", "name": "trainer-0", "host": "n1", "local": 0, "environment": {}}
    plan = {"attempt": 1, "hosts": [["n1", "10.0.0.1"]], "tasks": [role | {"arguments": ["-c", TASK]}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "key").write_text("key")
    command = (sys.executable, "-m", "launch.lib.task", str(tmp_path), "trainer")
    environment = {**os.environ, "SLURMD_NODENAME": "n1", "SLURM_LOCALID": "0"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG)
    assert said.returncode == 0, said
    assert said.stdout.splitlines()[1:] == ["True", "True"]
    assert TASK_LINE.match(said.stdout.splitlines()[0]), "the script waits for this line"
