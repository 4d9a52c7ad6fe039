"""Who is blamed for a standstill, when there is none, and that every role writes its stacks."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from gspo_megatron.cluster import watchdog
from gspo_megatron.cluster.attempts import ATTEMPT_VARIABLE
from gspo_megatron.cluster.watchdog import Beat, Pulse, Watchdog, blame, follow
from tests.waiting import HANG, wait_until

NOW = 1000.0


def beat(entered: int, at: float, written: float = NOW, stage: str = "train") -> Beat:
    return Beat(stage, entered, at, written)


def test_no_process_group_gives_up_before_the_watchdog_does() -> None:
    from gspo_megatron.policy.mesh import COLLECTIVE_TIMEOUT

    assert COLLECTIVE_TIMEOUT.total_seconds() > max(watchdog.FIRST, watchdog.FACTOR * watchdog.FIRST)


def test_a_silent_rank_is_named_before_one_that_is_behind() -> None:
    beats = {0: beat(7, 990), 1: beat(6, 980), 2: beat(6, 985, written=950)}
    assert "trainer-2 is silent since 50 s, in train" in blame(beats, NOW, interval=2.0)


def test_the_rank_that_entered_fewest_stages_is_behind() -> None:
    beats = {0: beat(7, 900), 1: beat(5, 800, stage="pack"), 2: beat(6, 850)}
    assert "no progress for 100 s: trainer-1 is 2 stages behind, in pack" in blame(beats, NOW, interval=2.0)


def test_nobody_is_blamed_when_all_wait_in_one_place() -> None:
    assert "every trainer rank is in sync" in blame(
        {0: beat(7, 900, stage="sync"), 1: beat(7, 900, stage="sync")}, NOW, 2.0
    )


class Clock:
    """Stands in for `time` within the watchdog: a test moves it."""

    def __init__(self) -> None:
        self.now = NOW
        self.sleep = time.sleep

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


def test_a_stage_may_take_a_multiple_of_its_own_longest_time(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(watchdog, "SHORTEST", 0.0)
    pulse = Pulse()
    pulse.enter("train")
    assert pulse.limit() == watchdog.FIRST
    clock.now += 7.0
    pulse.leave()
    pulse.enter("train")
    assert pulse.limit() == 35.0


def test_one_rank_that_makes_progress_is_enough_and_a_standstill_ends_the_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], clock: Clock
) -> None:
    monkeypatch.setattr(watchdog, "SHORTEST", 1.0)
    monkeypatch.setattr(watchdog, "FIRST", 1.0)
    ended: list[int] = []
    pulses = [Pulse(), Pulse()]
    dogs = [Watchdog(tmp_path, rank, 2, pulse, 0.05, ended.append) for rank, pulse in enumerate(pulses)]
    follow(tmp_path, "controller", 0.05)
    for dog in dogs:
        dog.start()

    def pass_time() -> None:
        """Less than what makes a rank silent; both ranks look once more."""
        clock.now += 0.2
        beats = dogs[0].read
        wait_until(lambda: ended or [one.written for one in beats().values()] == [clock.now] * 2, "look of both ranks")

    for _ in range(12):  # rank 1 waits in one stage for longer than its limit, rank 0 sees answers come in
        pass_time()
        pulses[0].beat()
    assert not ended
    pulses[0].enter("train")
    while not ended:
        pass_time()
        assert clock.now < NOW + 60
    for dog in dogs:
        dog.join(HANG)
    assert set(ended) == {watchdog.FAILED}
    said = read_until(capfd, "stacks of controller:")
    assert "trainer-1 is 1 stages behind, in start" in said
    assert all(f"stacks of {role}:" in said for role in ("trainer-0", "trainer-1"))


def read_until(capfd: pytest.CaptureFixture[str], words: str) -> str:
    """Standard error from here on until it holds the words."""
    said: list[str] = []

    def reached() -> bool:
        said.append(capfd.readouterr().err)
        return words in "".join(said)

    wait_until(reached, f"{words!r} in the log")
    return "".join(said)


CHILD = """
import signal, sys, time
from gspo_megatron.cluster.watchdog import answer_for_stacks
def busy_in_c():
    print("ready", flush=True)
    signal.sigwait([signal.SIGTERM])
if sys.argv[1] == "knows":
    answer_for_stacks()
busy_in_c()
"""


def test_children_that_know_how_write_their_stacks_and_others_live_on(capfd: pytest.CaptureFixture[str]) -> None:
    children = {
        kind: subprocess.Popen([sys.executable, "-c", CHILD, kind], stdout=subprocess.PIPE) for kind in ("knows", "not")
    }
    for child in children.values():
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    watchdog.ask_children("rollout-0")
    said = read_until(capfd, "in busy_in_c")
    assert f"stacks of rollout-0, process {children['knows'].pid} " in said
    assert str(children["not"].pid) not in said
    for child in children.values():
        assert child.poll() is None
        child.kill()
        child.wait()


def test_a_replaced_attempt_ends_within_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ATTEMPT_VARIABLE, "1")
    (tmp_path / "attempt").write_text("1 77\n")
    ended: list[int] = []
    dog = Watchdog(tmp_path, 0, 1, Pulse(), 0.05, ended.append)
    dog.start()
    for _ in range(3):
        looked = time.time()
        wait_until(lambda since=looked: any(one.written > since for one in dog.read().values()), "look")
    assert dog.is_alive() and not ended
    (tmp_path / "newer").write_text("2 77\n")
    (tmp_path / "newer").rename(tmp_path / "attempt")
    dog.join(HANG)
    assert ended == [watchdog.FAILED]
    assert f"attempt 1 was replaced by attempt 2 of {tmp_path}; this one ends" in capfd.readouterr().err


def test_it_imports_without_torch() -> None:
    command = [sys.executable, "-c", "import gspo_megatron.cluster.watchdog, sys; assert 'torch' not in sys.modules"]
    assert subprocess.run(command, check=False).returncode == 0
