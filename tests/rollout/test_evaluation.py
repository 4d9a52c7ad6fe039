"""`gspo eval` live: real servers that load weights from files score as those that a trainer sent them to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.cli import main
from tests.places import ROOT
from tests.rollout.jobs import (
    ANSWERS,
    CONTROLLER,
    PROMPTS,
    SERVER,
    assert_all_ended,
    finish,
    processes_with,
    rows_of,
    start,
    wait_for,
)
from tests.waiting import HANG

KEYS = (
    "data.held_out=32", "evaluation.problems=16", "rollout.kv_cache_gib=0.0625",
    "model.dtype=float32",
)  # fmt: skip


def start_evaluation(weights: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gspo_megatron.cli", "eval", str(weights), "recipes/tiny_moe.yaml", "--out"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, str(out), *KEYS, *more], cwd=ROOT, env=os.environ, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def evaluate(weights: Path, out: Path, *more: str) -> dict[str, Any]:
    job = start_evaluation(weights, out, *more)
    output = finish(job)
    assert job.returncode == 0, output[-3000:]
    assert_all_ended(out)
    return json.loads((out / "evaluation.json").read_text())


def test_files_score_as_the_weights_of_the_run_did(tmp_path: Path) -> None:
    """Greedy responses of `final/` are those of the run's own last evaluation; its checkpoint is sampled twice; Ctrl-C
    ends every process."""
    # Few distinct responses would hide a difference: the starting weights are wide (tests/rollout/jobs.py).
    job = start(tmp_path, "trainer.max_steps=2", "checkpoint.every=2")
    output = finish(job)
    assert job.returncode == 0, output[-3000:]
    row, run = rows_of(tmp_path)[-1], tmp_path / "run"
    found = evaluate(run / "checkpoints" / "final", tmp_path / "greedy")
    results = {one["name"]: one for one in found["results"]}
    assert results["avg@1"]["value"] == row["eval/accuracy"]
    assert results["mean reward"]["value"] == row["eval/mean_reward"]
    assert found["mean_tokens"] == row["eval/mean_length"]
    examples = json.loads((run / "examples.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "greedy" / "answers.jsonl").read_text().splitlines()]
    said = {line["question"]: line["response"] for line in lines}
    assert len(lines) == 16 and [said[one["question"]] for one in examples] == [one["answer_text"] for one in examples]

    sampled = evaluate(
        run / "checkpoints" / "step_000002", tmp_path / "sampled", "evaluation.temperature=1", "evaluation.answers=2"
    )
    assert (sampled["problems"], sampled["answers"], sampled["temperature"]) == (16, 2, 1.0)
    assert [one["name"] for one in sampled["results"]] == ["avg@2", "pass@1", "pass@2", "mean reward"]
    lines = [json.loads(line) for line in (tmp_path / "sampled" / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 32 and len({line["response"] for line in lines}) > 16

    # The run's own responses, by the index of its sample store.
    exported = tmp_path / "trained.jsonl"
    assert main(["answers", str(run), "--step", "2", "--export", str(exported)]) == 0
    lines = [json.loads(line) for line in exported.read_text().splitlines()]
    assert len(lines) == PROMPTS * ANSWERS
    assert sum(line["reward"] for line in lines) / len(lines) == pytest.approx(row["reward_mean"])
    assert sum(line["tokens"] for line in lines) / len(lines) == pytest.approx(row["answer_length"])

    out = tmp_path / "interrupted"
    job = start_evaluation(run, out)
    wait_for(job, "server and controller", lambda: processes_with(out, SERVER) and processes_with(out, CONTROLLER))
    job.send_signal(signal.SIGINT)
    output = job.communicate(timeout=HANG)[0]
    assert job.returncode == 130 and "ended by SIGINT" in output
    assert_all_ended(out)
