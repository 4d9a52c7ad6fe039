"""The main job for three steps, with every process real; and the end of the job when one of its processes dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.places import ROOT

SMALL = (
    "cold_start.steps=3", "cold_start.batch_size=8", "batch.prompts=8", "batch.answers=4", "trainer.max_steps=3",
    "evaluation.problems=16", "evaluation.every=0", "data.held_out=32", "rollout.kv_cache_gib=0.0625",
    # Three steps of fine-tuning leave the weights near their start, where everything is uniform; wider ones are not.
    "model.architecture.initializer_range=0.1", "optimizer.lr=3e-3", "optimizer.warmup_updates=0",
)  # fmt: skip


def start(directory: Path, *more: str, module: str = "gspo_megatron.cli") -> subprocess.Popen[str]:
    overrides = [*SMALL, *more, f"run.directory={directory / 'run'}", f"cold_start.cache={directory / 'cold_start'}"]
    command = [sys.executable, "-m", module, "train", "recipes/tiny_moe.yaml", *overrides]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes_of(directory: Path) -> dict[int, str]:
    """Living processes whose command line or environment names this run: {pid: command line}."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in command:
            found[int(entry.name)] = command
    return found


def assert_all_ended(directory: Path) -> None:
    """Processes that were sent SIGKILL need a moment on a busy machine."""
    deadline = time.monotonic() + 10
    while left := processes_of(directory):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("main_job")
    job = start(directory)
    said, _ = job.communicate(timeout=280)
    assert job.returncode == 0, said[-3000:]
    return directory, said


def rows_of(directory: Path) -> list[dict]:
    rows = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"]]


def test_three_steps_leave_everything_that_is_promised(finished: tuple[Path, str]) -> None:
    directory, said = finished
    run = directory / "run"
    assert [row["step"] for row in rows_of(directory)] == [1, 2, 3]
    for name in (
        "recipe.resolved.yaml",
        "objective.txt",
        "accuracy.png",
        "report.html",
        "DONE",
        "logs/attempt_1/trainer-1.log",
    ):
        assert (run / name).is_file(), name
    assert (run / "checkpoints" / "final" / "model.safetensors.index.json").is_file()
    assert list((run / "tensorboard").iterdir())
    assert (run / "objective.txt").read_text().strip() in said
    assert_all_ended(directory)


def test_the_first_mini_batch_has_not_moved_and_later_ones_have(finished: tuple[Path, str]) -> None:
    trained = [row for row in rows_of(finished[0]) if row["zero_variance_groups"] < 1]
    for row in rows_of(finished[0]):
        assert row["log_s_abs_max/minibatch_0"] <= 1e-6
        assert row["clip_fraction_sequences/minibatch_0"] == 0
    # Random weights may give a batch without a single right answer: nothing can move then, and the warning says so.
    assert all(row["log_s_abs_max/minibatch_3"] > 1e-6 for row in trained if row["grad_norm"] > 0)
    assert trained or "constant-reward" in finished[1]


def test_every_update_arrived(finished: tuple[Path, str]) -> None:
    rows = rows_of(finished[0])
    assert [row["weight_version"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["canary_mean"] < 1e-5
        assert row["canary_largest"] < 1e-4


@pytest.mark.parametrize("victim", ["rollout.server", "rollout.controller", "gspo_megatron.trainer.loop"])
def test_a_killed_process_ends_the_job(tmp_path: Path, victim: str) -> None:
    job = start(tmp_path)
    try:
        found: list[int] = []
        while not found:
            time.sleep(0.1)
            found = [pid for pid, command in processes_of(tmp_path).items() if victim in command]
        time.sleep(2)
        os.kill(max(found), signal.SIGKILL)
        began = time.monotonic()
        said, _ = job.communicate(timeout=60)
    finally:
        job.terminate()
    assert time.monotonic() - began < 20
    assert job.returncode == 1
    assert "failed: killed by SIGKILL" in said.strip().splitlines()[-1]
    assert_all_ended(tmp_path)


def test_ctrl_c_ends_the_job(tmp_path: Path) -> None:
    job = start(tmp_path)
    while len(processes_of(tmp_path)) < 5:
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    began = time.monotonic()
    said, _ = job.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert job.returncode == 130
    assert "SIGINT" in said.strip().splitlines()[-1]
    assert_all_ended(tmp_path)
