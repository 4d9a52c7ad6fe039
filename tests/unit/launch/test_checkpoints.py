"""Which checkpoint directories count, and which ones the rotation deletes."""

from __future__ import annotations

from pathlib import Path

from gspo_megatron.run_dir import complete_checkpoints
from gspo_megatron.run_log import RunLog
from gspo_megatron.trainer.checkpoint import CheckpointWriter


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


def test_the_rotation_deletes_only_what_the_trainer_wrote(tmp_path: Path) -> None:
    places = tmp_path / "checkpoints"
    own = ("step_000001", "step_000002", ".step_000003.0a1b2c3d.partial")
    foreign = ("step_000001_best", "step_1", "step_000001.bak", ".step_000001.partial", "best", "step_000002 copy")
    for name in (*own, *foreign):
        (places / name).mkdir(parents=True)
        (places / name / "COMPLETE").touch()
    partial = places / ".step_000003.00000000.partial"
    partial.mkdir()
    writer = CheckpointWriter(places, 2, RunLog(tmp_path, owns_terminal=False))
    writer._publish(partial, {"step": 3})
    assert sorted(path.name for path in places.iterdir()) == sorted(("step_000002", "step_000003", *foreign))
