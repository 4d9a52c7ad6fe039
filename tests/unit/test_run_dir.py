"""Names in a run directory: ours are found, whatever else lies there is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.run_dir import (
    ATTEMPT,
    CHECKPOINT,
    DUMP,
    EXPORT,
    NumberedName,
    RunDir,
    complete_checkpoints,
    is_partial,
    partial_name,
)


@pytest.mark.parametrize(
    ("family", "number", "name"),
    [
        (CHECKPOINT, 12, "step_000012"),
        (CHECKPOINT, 1_234_567, "step_1234567"),
        (EXPORT, 12, "hugging_face_000012"),
        (DUMP, 3, "update_000003"),
        (ATTEMPT, 3, "attempt_3"),
        (ATTEMPT, 10, "attempt_10"),
    ],
)
def test_a_name_and_its_number(family: NumberedName, number: int, name: str) -> None:
    assert family.name(number) == name
    assert family.parse(name) == number


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (CHECKPOINT, "step_000002_best"),
        (CHECKPOINT, "step_2"),
        (CHECKPOINT, "step_0000002"),
        (CHECKPOINT, "step_00000a"),
        (CHECKPOINT, "step_000002\n"),
        (CHECKPOINT, "my_step_000002"),
        (CHECKPOINT, ".step_000002.0f1e2d3c.partial"),
        (CHECKPOINT, "step_-00001"),
        (CHECKPOINT, "step_\u0660\u0660\u0660\u0660\u0660\u0661"),
        (ATTEMPT, "attempt_1_old"),
        (ATTEMPT, "attempt_01"),
        (ATTEMPT, "attempt_"),
        (EXPORT, "hugging_face_000012.bak"),
    ],
)
def test_a_foreign_name_has_no_number(family: NumberedName, name: str) -> None:
    assert family.parse(name) is None


def test_only_complete_checkpoints_of_our_names_count(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert complete_checkpoints(run.checkpoints) == []
    for name in ("step_000010", "step_000002", "step_000002_best", "step_1000000", "final"):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "COMPLETE").touch()
    run.checkpoint(3).path.mkdir()
    assert [path.name for path in complete_checkpoints(run.checkpoints)] == [
        "step_000002",
        "step_000010",
        "step_1000000",
    ]


def test_a_partial_checkpoint_is_known_by_its_name() -> None:
    assert partial_name(12, "0a1b2c3d") == ".step_000012.0a1b2c3d.partial"
    assert is_partial(partial_name(12, "0a1b2c3d"))
    for name in (
        ".step_000012.partial",
        ".step_000012_best.0a1b2c3d.partial",
        "step_000012.0a1b2c3d.partial",
        ".step_12.0a1b2c3d.partial",
    ):
        assert not is_partial(name)


def test_the_next_attempt_follows_the_largest_number(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.next_attempt() == 1
    for name in ("attempt_2", "attempt_10", "attempt_11_old", "latest"):
        (run.logs / name).mkdir(parents=True)
    assert run.next_attempt() == 11
    attempt = run.attempt_logs(11)
    assert attempt.path == tmp_path / "logs" / "attempt_11"
    assert attempt.run == run
    assert attempt.log("trainer-0") == tmp_path / "logs" / "attempt_11" / "trainer-0.log"


def test_every_name_is_its_own(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    names = [name for name, value in vars(RunDir).items() if isinstance(value, property)]
    paths = [getattr(run, name) for name in names]
    assert len(set(paths)) == len(paths) == 22
    assert all(path.is_relative_to(tmp_path) for path in paths)
