"""A run with a real server is asked to stop and goes on: nothing of its state moves in between, no prompt is lost."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gspo_megatron.data.sample_index import read_samples
from gspo_megatron.data.store import SampleStore
from gspo_megatron.data.stream import PromptStream
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.models import load_resolved
from gspo_megatron.policy.snapshot import SAVE
from gspo_megatron.run_dir import complete_checkpoints
from tests.rollout import holds_responses, saves_again
from tests.rollout.jobs import ANSWERS, PROMPTS, assert_all_ended, finish, rows_of, start
from tests.rollout.saves_again import AGAIN

STEPS = 5
# One version behind: responses are in flight when the run stops, and are continued by the next attempt.
SHAPE = (
    f"trainer.max_steps={STEPS}", "checkpoint.every=1",
    "rollout.max_staleness=1", "rollout.max_concurrency=2", "rollout.stream_interval=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run directory, and a copy of the checkpoint that the run went on from."""
    directory = tmp_path_factory.mktemp("live_resume")
    job = start(directory, *SHAPE, module=holds_responses.HERE)
    said = finish(job)
    assert job.returncode == 85, said[-3000:]
    assert_all_ended(directory)
    run_dir = directory / "run"
    kept = directory / "kept"
    shutil.copytree(complete_checkpoints(run_dir / "checkpoints")[-1], kept)
    job = start(directory, *SHAPE, module=saves_again.HERE)
    said = finish(job)
    assert job.returncode == 0, said[-3000:]
    assert f"goes on after step {state_of(kept)['step']} (" in said
    return run_dir, kept


def state_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


def test_what_was_restored_is_saved_again_bit_for_bit(run: tuple[Path, Path]) -> None:
    run_dir, kept = run
    (again,) = complete_checkpoints(run_dir / AGAIN)
    files = sorted(path.name for path in kept.glob("rank_*"))
    assert len(files) == 2 and files == sorted(path.name for path in again.glob("rank_*"))
    for name in files:
        held, found = load_file(kept / name), load_file(again / name)
        assert held.keys() == found.keys()
        assert [entry for entry in held if not torch.equal(held[entry], found[entry])] == [], name
        wanted = {"rng"} | ({"value", "exp_avg", "exp_avg_sq"} if name == files[0] else set())
        assert {entry.split("/")[0] for entry in held} == wanted, "the first of two replicas writes for both"
    before, after = state_of(kept), state_of(again)
    # The first `sync` makes it the version that the servers had.
    assert after.pop("version") + 1 == before.pop("version") == before["step"]
    assert after.pop(SAVE) != before.pop(SAVE), "each save has a token of its own"
    assert before["controller"]["groups"] and before["controller"]["drafts"], "nothing was under way"
    # What the first attempt sampled between its last save and its end is counted, and is no part of anything else.
    counts = after["controller"]["accounting"]
    counts["sampled_tokens"] -= counts["dropped"].pop("attempt-lost", {"tokens": 0})["tokens"]
    # An attempt writes a file of its own: the same bytes under another name.
    files = [
        {entry.pop("path").partition("@")[0] for entry in state["controller"]["drafts"]} for state in (before, after)
    ]
    store = run_dir / before["controller"]["store"]
    (held,), (found,) = ([(store / name).read_bytes() for name in names] for names in files)
    assert files[0] != files[1] and held == found
    assert after == before, "prompt stream, accounting, answers under way, counters, layout, objective"


def test_every_step_is_there_once_and_counts_on(run: tuple[Path, Path]) -> None:
    run_dir, kept = run
    rows = rows_of(run_dir.parent)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert holds_responses.STOP_STEP <= state_of(kept)["step"] < STEPS
    assert [row["updates"] for row in rows[1:]] == [4 * step for step in range(1, STEPS + 1)]
    assert [row["weight_version"] for row in rows[1:]] == list(range(STEPS))
    assert all(row["canary_largest"] < 1e-4 for row in rows[1:])
    gone = sum(count for name, count in rows[-1].items() if name.startswith("dropped_tokens/"))
    trained = sum(row["rollout_tokens"] for row in rows[1:])
    assert rows[-1]["sampled_tokens"] == trained + rows[-1]["carried_tokens"] + gone


def test_no_prompt_is_lost_doubled_or_out_of_order(run: tuple[Path, Path]) -> None:
    run_dir, _ = run
    state = state_of(run_dir / "checkpoints" / f"step_{STEPS:06d}")["controller"]
    recipe = load_resolved(run_dir / "recipe.resolved.yaml")
    stream = PromptStream(recipe, load_tokenizer(recipe.tokenizer, recipe.model.path))
    wanted = [prompt.token_ids for prompt in stream.next(state["stream"]["index"])]
    carried = [group["prompt"]["index"] for group in state["groups"]]
    answered = Counter[int]()
    store = SampleStore(run_dir / "samples")
    for sample in read_samples(store.directory):
        ids, start, _ = store.read(sample.ref)
        index = sample.ref.prompt_index
        assert tuple(ids[:start].tolist()) == wanted[index], sample
        answered[index] |= 1 << sample.ref.sample_index
    trained = [index for index, found in answered.items() if index not in carried]
    assert all(answered[index] == (1 << ANSWERS) - 1 for index in trained)
    assert state["accounting"]["taken"]["prompts"] == len(trained) == STEPS * PROMPTS
    assert sorted(trained + carried) == list(range(len(wanted)))
