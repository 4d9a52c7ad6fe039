"""A run stops when it is asked to, and before its time is over."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_megatron import stopping
from gspo_megatron.stopping import END_TIME, StopRequest

TRAINER: Any = SimpleNamespace(on_first_rank=lambda ask: ask(None))


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
    monkeypatch: pytest.MonkeyPatch, left: float, save_seconds: float, stops: bool
) -> None:
    monkeypatch.setenv(END_TIME, str(time.time() + left))
    assert StopRequest().is_raised(TRAINER, save_seconds) is stops


def test_the_slowest_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(END_TIME, str(time.time() + stopping.MARGIN + 10.0))
    request = StopRequest()
    request._began -= 5.0
    assert not request.is_raised(TRAINER, 1.0)
    assert not request.is_raised(TRAINER, 1.0), "a quick one does not make the slow one forgotten"
    request._began -= 9.0
    assert request.is_raised(TRAINER, 1.0)
