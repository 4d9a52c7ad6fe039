"""Which checkpoint is whole, and which ones the rotation deletes."""

from __future__ import annotations

from pathlib import Path

from gspo_megatron.run_log import RunLog
from gspo_megatron.trainer.checkpoint import CheckpointWriter, is_whole


def test_a_checkpoint_whose_files_were_cut_or_lost_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "rank_00000.safetensors").write_bytes(bytes(100))
    (tmp_path / "state.json").write_text('{"files": {"rank_00000.safetensors": 100}}')
    assert is_whole(tmp_path)
    (tmp_path / "rank_00000.safetensors").write_bytes(bytes(99))
    assert not is_whole(tmp_path)
    (tmp_path / "rank_00000.safetensors").unlink()
    assert not is_whole(tmp_path)


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
