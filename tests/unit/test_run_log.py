"""The run log: a row a step in every place, what a crash leaves, and what a terminal and a file are shown."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gspo_megatron import run_log
from gspo_megatron.metric_rows import read_rows
from gspo_megatron.run_dir import RunDir
from gspo_megatron.run_log import RunLog
from gspo_megatron.types import Finding

ROW = {"reward_mean": 0.5, "answer_length": 18.25, "clip_fraction_sequences": 0.125, "grad_norm": 0.71}


def write_steps(run_dir: Path, *steps: int, reward: float = 0.5) -> None:
    with RunLog(run_dir, owns_terminal=True) as log:
        for step in steps:
            with log.step(step):
                log.add(ROW | {"reward_mean": reward})


def test_a_step_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, owns_terminal=True) as log, log.step(7):
        log.add(ROW)
        with log.time("rollout"):
            time.sleep(0.06)
        with log.time("train"):
            pass
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["step    7  reward 0.500  length 18.2  clipped 0.125  grad 0.71  0.1 s (rollout 0.1  train 0.0)"]


def test_parts_add_up_within_a_step_and_start_anew(tmp_path: Path) -> None:
    with RunLog(tmp_path, owns_terminal=True) as log:
        for step in (1, 2):
            with log.step(step):
                log.add(ROW)
                for _ in range(2 if step == 1 else 0):
                    with log.time("train"):
                        time.sleep(0.02)
    first, second = read_rows(tmp_path)
    assert first["seconds/step"] >= first["seconds/train"] >= 0.04
    assert "seconds/train" not in second


def test_what_takes_time_between_two_steps_is_of_the_later_one(tmp_path: Path) -> None:
    with RunLog(tmp_path, owns_terminal=True) as log:
        with log.time("sync"):
            pass  # before the first step: of none
        with log.step(1):
            log.add(ROW)
        with log.time("checkpoint"):
            time.sleep(0.02)
        with log.step(2):
            log.add(ROW)
        with log.step(3):
            log.add(ROW)
    parts = [{name for name in row if name.startswith("seconds/")} for row in read_rows(tmp_path)]
    assert parts == [{"seconds/step"}, {"seconds/step", "seconds/checkpoint"}, {"seconds/step"}]


def test_a_line_that_a_crash_cut_off_is_forgotten(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    file = RunDir(tmp_path).metrics
    file.write_text(file.read_text() + '{"step": 3, "rew')
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]
    write_steps(tmp_path, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_of_a_step_run_twice_the_later_row_counts(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, reward=0.1)
    write_steps(tmp_path, 2, reward=0.9)
    assert [row["reward_mean"] for row in read_rows(tmp_path)] == [0.1, 0.9]


def test_a_run_that_goes_on_takes_back_the_later_points(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, reward=0.1)
    with RunLog(tmp_path, owns_terminal=True) as log:
        log.rewind(1)
        with log.step(2):
            log.add(ROW)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(point.step, round(point.value, 3)) for point in board.Scalars("reward_mean")] == [(1, 0.1), (2, 0.5)]


def test_a_failed_step_leaves_no_row(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunLog(tmp_path, owns_terminal=True) as log, log.step(1):
        raise RuntimeError("lost server")
    assert not (RunDir(tmp_path).metrics).exists()


def test_long_phases_get_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 20.0, 25.0])
    monkeypatch.setattr(run_log.time, "monotonic", lambda: next(clock))
    with RunLog(tmp_path, owns_terminal=True).progress("rollout", 512) as bar:
        for done in (100, 200, 250):
            bar.update(done)
    assert capsys.readouterr().out.splitlines() == ["rollout: 200/512, 10.0/s, 31 s left"]


def test_examples_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, owns_terminal=True)
    examples = [{"question": "a\nb\x1b[2J", "answer_text": "w" * 1000, "reward": 0.5}]
    log.run_dir.examples.write_text(json.dumps(examples))
    log.finish()
    assert capsys.readouterr().out.splitlines()[0] == f"  a b\\x1b[2J  ->  {'w' * 200} ...  (reward 0.5)"


def test_warnings_are_shown_and_notes_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, owns_terminal=True)
    log.warn(Finding("constant-reward", "warning", "reward.name", "all 512 rewards are [0]", "look at the answers"))
    log.warn(Finding("some-note", "info", "reward.name", "a note", "nothing"))
    shown = "warning [constant-reward] reward.name: all 512 rewards are [0]; look at the answers"
    assert capsys.readouterr().out.splitlines() == [shown]


def test_names_are_those_of_the_readme() -> None:
    """What the terminal line and the plot read is documented."""
    package = Path(run_log.__file__).parent
    documented = (package / "README.md").read_text() + (package / "objective/README.md").read_text()
    assert [name for name in ROW if f"`{name}" not in documented] == []
