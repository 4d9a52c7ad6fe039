"""One of three real servers is killed during the main job: nothing is lost, nothing doubled, and it comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

from tests.rollout.test_main_job import assert_all_ended, processes_of, start

SERVERS, STEPS, PROMPTS, ANSWERS = 3, 12, 8, 4


def test_a_killed_server_costs_nothing_and_comes_back(tmp_path: Path) -> None:
    job = start(tmp_path, f"rollout.servers={SERVERS}", f"trainer.max_steps={STEPS}", "evaluation.problems=64")
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
            assert job.poll() is None, job.communicate()[0][-3000:]
            time.sleep(0.05)
        api = [
            pid
            for pid, command in processes_of(tmp_path).items()
            if "rollout.server" in command and "--index 1" in command
        ]
        os.kill(min(api), signal.SIGKILL)
        said, _ = job.communicate(timeout=280)
    finally:
        job.terminate()
    assert job.returncode == 0, said[-3000:]
    assert "rollout-1 ended and is started again" in said
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert all(row["canary_largest"] < 1e-4 for row in rows[1:]), (
        "each server is held against the trainer in every step"
    )
    names = sorted(path.name.split("-v")[0] for path in (tmp_path / "run" / "samples").glob("*.sample"))
    assert names == [f"{prompt:08d}-{sample:04d}" for prompt in range(PROMPTS * STEPS) for sample in range(ANSWERS)]
    log = (tmp_path / "run" / "logs" / "attempt_1" / "controller.log").read_text()
    assert re.search(r"server http://127.0.0.1:\d+ is taken out", log)
    assert re.search(r"server http://127.0.0.1:\d+ is back", log), "the run ended before the server was there again"
    last = rows[-1]
    assert last["sampled_tokens"] == sum(row["rollout_tokens"] for row in rows[1:]) + lost_tokens(last)
    assert_all_ended(tmp_path)


def lost_tokens(row: dict) -> int:
    return sum(count for name, count in row.items() if name.startswith("dropped_tokens/"))
