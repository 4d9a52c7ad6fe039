"""How far a run is, and which attempt may publish."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.cluster.attempts import Attempt, newest_checkpoint, read_attempt, refuse_if_replaced, replacement


def test_the_newest_checkpoint_is_the_largest_marked_one_of_our_names(tmp_path: Path) -> None:
    places = tmp_path / "checkpoints"
    for name in ("step_000010", "step_1000000", "step_000009", ".step_000012.0a1b2c3d.partial", "final", "step_9_x"):
        (places / name).mkdir(parents=True)
        (places / name / "COMPLETE").touch()
    (places / "step_2000000").mkdir()
    assert newest_checkpoint(tmp_path) == 1000000 and newest_checkpoint(tmp_path / "none") == 0


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
