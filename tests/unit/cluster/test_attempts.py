"""Which names of a run directory are the program's own, and which attempt may publish."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.cluster.attempts import (
    Attempt,
    attempt_number,
    attempts,
    checkpoint_step,
    complete_checkpoints,
    is_partial_checkpoint,
    newest_checkpoint,
    partial_checkpoint_name,
    read_attempt,
    refuse_if_replaced,
    replacement,
)


@pytest.mark.parametrize(
    ("name", "step"),
    [("step_000012", 12), ("step_000000", 0), ("step_1234567", 1234567), ("step_000002_best", None), ("step_12", None),
     ("step_0000012", None), ("step_-00012", None), ("step_000012.bak", None), ("Step_000012", None), ("step_", None),
     (" step_000012", None), ("step_000012\n", None), ("step_\u0661\u0661\u0661\u0661\u0661\u0661", None),
     ("step_00001_", None), ("step_" + "9" * 5000, None)],
)  # fmt: skip
def test_only_our_own_checkpoint_names_are_read(name: str, step: int | None) -> None:
    assert checkpoint_step(name) == step


@pytest.mark.parametrize(
    ("name", "number"),
    [("attempt_1", 1), ("attempt_12", 12), ("attempt_1_old", None), ("attempt_01", None), ("attempt_", None),
     ("attempt_1.tar", None), ("attempt_one", None), ("my_attempt_1", None)],
)  # fmt: skip
def test_only_our_own_attempt_names_are_read(name: str, number: int | None) -> None:
    assert attempt_number(name) == number


def test_partial_names() -> None:
    assert is_partial_checkpoint(partial_checkpoint_name(3, "0a1b2c3d"))
    assert not is_partial_checkpoint(".step_000003.partial.mine") and not is_partial_checkpoint(".step_3.x.partial")


def test_only_marked_directories_count_and_the_newest_is_last(tmp_path: Path) -> None:
    places = tmp_path / "checkpoints"
    for name in ("step_000010", "step_1000000", "step_000009", ".step_000012.0a1b2c3d.partial", "final", "step_9_x"):
        (places / name).mkdir(parents=True)
        (places / name / "COMPLETE").touch()
    (places / "step_2000000").mkdir()
    found = [path.name for path in complete_checkpoints(places)]
    assert found == ["step_000009", "step_000010", "step_1000000"]
    assert newest_checkpoint(tmp_path) == 1000000
    assert complete_checkpoints(tmp_path / "none") == [] and newest_checkpoint(tmp_path / "none") == 0


def test_attempts_are_counted_without_a_users_copies(tmp_path: Path) -> None:
    for name in ("attempt_1", "attempt_10", "attempt_2", "attempt_10_old", "latest"):
        (tmp_path / name).mkdir()
    assert attempts(tmp_path) == [1, 2, 10] and attempts(tmp_path / "none") == []


def test_the_attempt_file(tmp_path: Path) -> None:
    assert read_attempt(tmp_path) is None
    (tmp_path / "attempt").write_text("12 4242\n")
    assert read_attempt(tmp_path) == Attempt(12, "4242")


@pytest.mark.parametrize("text", ["", "\n", "2", "two 7\n", "2 7 8\n", "-1 7\n", "\0\0\0\0"])
def test_a_broken_attempt_file_is_one_sentence_and_replaces_nothing(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "attempt").write_text(text)
    with pytest.raises(ValueError, match="not the number of an attempt and its job; remove the file"):
        read_attempt(tmp_path)
    monkeypatch.setenv("GSPO_ATTEMPT", "1")
    assert replacement(tmp_path) is None


def test_an_attempt_that_was_replaced_does_not_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GSPO_ATTEMPT", raising=False)
    refuse_if_replaced(tmp_path)  # one machine: no attempts
    (tmp_path / "attempt").write_text("2 4242\n")
    monkeypatch.setenv("GSPO_ATTEMPT", "2")
    refuse_if_replaced(tmp_path)
    monkeypatch.setenv("GSPO_ATTEMPT", "1")
    with pytest.raises(ValueError, match="attempt 1 was replaced by attempt 2"):
        refuse_if_replaced(tmp_path)
