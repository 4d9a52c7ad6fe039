"""One of three real servers is killed during the main job: nothing is lost, nothing doubled, and it comes back.

The job replays the sampler's routes, so each response also keeps those of the tokens that it had before the loss.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from gspo_megatron.data.sample_index import read_samples
from gspo_megatron.data.store import SampleStore
from tests.rollout.jobs import (
    ANSWERS,
    PROMPTS,
    SERVER,
    assert_all_ended,
    finish,
    processes_of,
    rows_of,
    start,
    wait_for,
)

ROUTES = ("objective.replay=sampler", "trainer.skip_zero_gradients=false")


def test_a_killed_server_costs_nothing_and_comes_back(tmp_path: Path) -> None:
    job = start(tmp_path, "rollout.servers=3", "trainer.max_steps=1000", "checkpoint.every=0", *ROUTES)
    log = tmp_path / "run" / "logs" / "attempt_1" / "controller.log"
    try:
        wait_for(job, "first step", lambda: len(rows_of(tmp_path)) >= 2)
        ours = processes_of(tmp_path).items()
        os.kill(min(pid for pid, text in ours if SERVER in text and "--index 1 " in text), signal.SIGKILL)
        wait_for(job, "server that is back", lambda: "is back" in log.read_text())
        before = len(rows_of(tmp_path))
        wait_for(job, "step after that", lambda: len(rows_of(tmp_path)) >= before + 2)
        reported = log.read_text()
        job.send_signal(signal.SIGINT)
        said = finish(job)
    finally:
        job.terminate()
    assert said.count("rollout-1 ended and is started again") == 1
    assert reported.count("is taken out") == 1
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert all(row["canary_largest"] < 1e-4 for row in rows[1:]), "in every step each server equals the trainer"
    finished = PROMPTS * (len(rows) - 1)
    refs = [sample.ref for sample in read_samples(tmp_path / "run" / "samples")]
    places = sorted((ref.prompt_index, ref.sample_index) for ref in refs if ref.prompt_index < finished)
    wanted = [(prompt, sample) for prompt in range(finished) for sample in range(ANSWERS)]
    assert places == wanted, "every prompt once, with all its answers"
    lost = sum(count for name, count in rows[-1].items() if name.startswith("dropped_tokens/"))
    assert rows[-1]["sampled_tokens"] == sum(row["rollout_tokens"] for row in rows[1:]) + lost
    store = SampleStore(tmp_path / "run" / "samples")
    for ref in refs:
        routes = store.read_routes(ref)
        assert routes is not None and len(routes) == ref.prompt_length + ref.answer_length - 1
    assert max(row["mismatch_sampled/replay_largest"] for row in rows[1:]) < 1e-4, "routes of other tokens"
    assert_all_ended(tmp_path)
