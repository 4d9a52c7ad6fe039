"""The controller of the main job is killed in a step: the run goes on from its checkpoint, and every token is found."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from gspo_megatron.controller.controller import RECEIVED_TOKENS
from gspo_megatron.data.sample_index import read_samples
from tests.rollout.jobs import (
    ANSWERS,
    CONTROLLER,
    PROMPTS,
    assert_all_ended,
    finish,
    processes_with,
    rows_of,
    start,
    wait_for,
)

STEPS = 5
# One step off, so that groups are under way at every checkpoint; answers longer than a step takes to train.
SETTINGS = (
    "checkpoint.every=1",
    "rollout.max_staleness=1",
    f"trainer.max_steps={STEPS}",
    "rollout.max_answer_tokens=64",
)


def received(directory: Path) -> int:
    return int.from_bytes((directory / "run" / "samples" / RECEIVED_TOKENS).read_bytes(), "little")


def answer_lengths(directory: Path) -> dict[tuple[int, int], int]:
    """Tokens of every answer that was trained on, by prompt and sample; each must be there once."""
    refs = [sample.ref for sample in read_samples(directory / "run" / "samples")]
    lengths = {(ref.prompt_index, ref.sample_index): ref.answer_length for ref in refs}
    assert len(lengths) == len(refs), "an answer is stored twice"
    return lengths


def newest_checkpoint(directory: Path) -> Path:
    """The newest that is complete."""
    return max((directory / "run" / "checkpoints").glob("step_*/COMPLETE")).parent


def controller_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())["controller"]


def unsaved_tokens(directory: Path) -> int:
    """Tokens that came after the newest checkpoint."""
    return received(directory) - controller_state(newest_checkpoint(directory))["accounting"]["sampled_tokens"]


def stops_with_unsaved_tokens(directory: Path, controller: int) -> bool:
    """Stop the controller; let it go on where no token came since the newest checkpoint or one is being written."""
    os.kill(controller, signal.SIGSTOP)
    if not list((directory / "run" / "checkpoints").glob("*.partial")) and unsaved_tokens(directory) > 0:
        return True
    os.kill(controller, signal.SIGCONT)
    return False


def test_a_killed_controller_loses_no_prompt_and_no_count(tmp_path: Path) -> None:
    job = start(tmp_path, *SETTINGS)
    checkpoints = tmp_path / "run" / "checkpoints"
    try:
        wait_for(job, "checkpoint", lambda: (checkpoints / "step_000002" / "COMPLETE").is_file())
        [victim] = processes_with(tmp_path, CONTROLLER)
        wait_for(job, "tokens after the newest checkpoint", lambda: stops_with_unsaved_tokens(tmp_path, victim))
        os.kill(victim, signal.SIGKILL)
        said = finish(job)
    finally:
        job.terminate()
    assert job.returncode == 1 and "controller failed: killed by SIGKILL" in said
    assert_all_ended(tmp_path)
    newest = newest_checkpoint(tmp_path)
    unsaved = unsaved_tokens(tmp_path)
    assert controller_state(newest)["groups"] and unsaved > 0, "nothing was under way when the controller died"

    again = start(tmp_path, *SETTINGS)
    try:
        said = finish(again)
    finally:
        again.terminate()
    assert again.returncode == 0, said[-3000:]
    assert f"goes on after step {int(newest.name.split('_')[1])}" in said
    assert (tmp_path / "run" / "DONE").is_file()

    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(STEPS + 1)), "every step has one row"
    trained = sum(row["rollout_tokens"] for row in rows[1:])
    dropped = {name: count for name, count in rows[-1].items() if name.startswith("dropped_tokens/")}
    assert dropped.pop("dropped_tokens/attempt-lost") == unsaved
    assert rows[-1]["sampled_tokens"] == trained + unsaved + rows[-1]["carried_tokens"] + sum(dropped.values())

    end = controller_state(checkpoints / f"step_{STEPS:06d}")
    under_way = {group["prompt"]["index"] for group in end["groups"]}
    given = set(range(end["stream"]["index"])) - under_way
    assert not dropped and end["accounting"]["taken"]["prompts"] == PROMPTS * STEPS == len(given)
    lengths = answer_lengths(tmp_path)
    assert {key for key in lengths if key[0] in given} == {(p, s) for p in given for s in range(ANSWERS)}
    assert sum(length for (prompt, _), length in lengths.items() if prompt in given) == trained, "each trained on once"
