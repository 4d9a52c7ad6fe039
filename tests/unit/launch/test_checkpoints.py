"""Which checkpoint directories count, and which attempt may write one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.cluster.attempts import refuse_if_replaced
from gspo_megatron.run_dir import complete_checkpoints
from gspo_megatron.trainer.checkpoint import is_whole


def make(directory: Path, name: str, marked: bool) -> Path:
    (directory / name).mkdir()
    if marked:
        (directory / name / "COMPLETE").touch()
    return directory / name


def test_only_marked_directories_count_and_the_newest_is_last(tmp_path: Path) -> None:
    newest = make(tmp_path, "step_000010", marked=True)
    older = make(tmp_path, "step_000009", marked=True)
    make(tmp_path, "step_000011", marked=False)
    make(tmp_path, ".step_000012.partial", marked=True)
    make(tmp_path, "final", marked=True)
    assert complete_checkpoints(tmp_path) == [older, newest]
    assert complete_checkpoints(tmp_path / "none") == []


def test_an_attempt_that_was_replaced_does_not_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GSPO_ATTEMPT", raising=False)
    refuse_if_replaced(tmp_path)  # one machine: no attempts
    (tmp_path / "attempt").write_text("2 4242\n")
    monkeypatch.setenv("GSPO_ATTEMPT", "2")
    refuse_if_replaced(tmp_path)
    monkeypatch.setenv("GSPO_ATTEMPT", "1")
    with pytest.raises(ValueError, match="attempt 1 was replaced by attempt 2"):
        refuse_if_replaced(tmp_path)


def test_a_checkpoint_whose_files_were_cut_or_lost_is_not_whole(tmp_path: Path) -> None:
    place = make(tmp_path, "step_000003", marked=True)
    (place / "rank_00000.safetensors").write_bytes(bytes(100))
    (place / "state.json").write_text('{"files": {"rank_00000.safetensors": 100}}')
    assert is_whole(place)
    (place / "rank_00000.safetensors").write_bytes(bytes(99))
    assert not is_whole(place)
    (place / "rank_00000.safetensors").unlink()
    assert not is_whole(place)
