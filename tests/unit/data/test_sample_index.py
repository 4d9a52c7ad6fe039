"""The index of a step: what it says is what was handed out, and what is kept no longer is gone."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gspo_megatron.data.sample_index import StoredSample, list_steps, read_samples
from gspo_megatron.data.store import SampleStore
from gspo_megatron.types import Masked, Problem, Prompt, Response, SampleRef, Segment


def prompt(index: int) -> Prompt:
    return Prompt(index, Problem(f"p{index}", f"Question {index}\nof two lines \ud800", {}, "42", "sums"), (5, 6))


def write(store: SampleStore, index: int, sample: int, length: int = 6) -> SampleRef:
    ids = np.full(length, index, np.int32)
    stop = "length" if sample % 2 else "stop"
    answer = Response(index, sample, ids, np.zeros(length, np.float32), (Segment(0, 0, length),), stop, limit=length)
    ref = store.write(prompt(index), answer, 0.25)
    return replace(ref, parts=(("right", 1.0), ("short", 0.5)), masked=(Masked(1, 2, "observation"),))


def step(
    store: SampleStore, number: int, keep: int | None = None, carried: tuple[SampleRef, ...] = ()
) -> list[SampleRef]:
    """Two groups of two, handed out for a step."""
    groups = [(prompt(i), [write(store, i, j) for j in range(2)]) for i in (2 * number, 2 * number + 1)]
    store.finish_step(number, groups, carried, keep)
    return [ref for _, refs in groups for ref in refs]


def test_an_index_gives_back_what_was_handed_out(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    refs = {number: step(store, number) for number in (1, 2, 3)}
    assert list_steps(tmp_path) == [1, 2, 3]
    assert [sample.ref for sample in read_samples(tmp_path)] == [ref for found in refs.values() for ref in found]
    (first, second, *_) = found = list(read_samples(tmp_path, {2, 7}.__contains__))
    assert [sample.ref for sample in found] == refs[2]
    assert first == StoredSample(2, refs[2][0], "p4", "Question 4\nof two lines ?", "42", "sums")
    assert (first.reward, first.is_clipped, second.is_clipped) == (0.25, False, True)
    assert store.read(second.ref)[0].tolist() == [5, 6, *[4] * 6]
    # A few files a step, not one a sample.
    assert len(list(tmp_path.iterdir())) == 6


def test_a_step_that_is_done_again_takes_the_place_of_the_lost_one(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    for number in (1, 2, 3):
        step(store, number)
    restored = SampleStore(tmp_path)  # a new process
    again = step(restored, 2)
    assert list_steps(tmp_path) == [1, 2]
    assert [sample.ref for sample in read_samples(tmp_path, {2}.__contains__)] == again
    assert sorted(path.name for path in tmp_path.glob("written_*")) == ["written_000001.bin", "written_000004.bin"]


@pytest.mark.parametrize("keep", [1, 2, 5, None])
def test_the_newest_steps_stay_and_so_does_what_is_in_flight(tmp_path: Path, keep: int | None) -> None:
    store = SampleStore(tmp_path)
    carried = (write(store, 99, 0),)
    foreign = [tmp_path / name for name in ("step_000001.jsonl.bak", "written_1.bin", "notes", "received_tokens")]
    for file in foreign:
        file.write_text("of somebody")
    for number in range(1, 8):
        step(store, number, keep, carried)
    kept = list(range(1, 8))[-(keep or 7) :]
    assert list_steps(tmp_path) == kept
    for sample in read_samples(tmp_path):
        assert len(store.read(sample.ref)[0]) == 8
    assert store.holds(carried[0]), "a later step may get it"
    # The first file holds what is in flight.
    wanted = {1, *kept}
    assert sorted(tmp_path.glob("written_0*")) == [tmp_path / f"written_{number:06d}.bin" for number in sorted(wanted)]
    assert all(file.read_text() == "of somebody" for file in foreign)


@pytest.mark.parametrize("seed", range(20))
def test_after_any_kill_what_an_index_names_can_be_read(tmp_path: Path, seed: int) -> None:
    """Steps, checkpoints and kills in any order: the open file is cut anywhere."""
    chance = random.Random(seed)
    store, number = SampleStore(tmp_path), 0
    for _ in range(30):
        event = chance.choice(["step", "step", "seal", "write", "kill"])
        if event == "step":
            number += 1
            step(store, number, keep=4)
        elif event == "seal":
            store.seal()
        elif event == "write":
            write(store, 1000 + number, 0)
        else:
            if store._file is not None:
                last = max(tmp_path.glob("written_*"))
                last.write_bytes(last.read_bytes()[: chance.randrange(200)])
            store, number = SampleStore(tmp_path), max(0, number - chance.randrange(3))
        for sample in read_samples(tmp_path):
            assert store.holds(sample.ref)
    assert len(list_steps(tmp_path)) <= 4 + 3


@pytest.mark.parametrize("line", ["", "{", "[]", '{"format": 2}', '{"format": 1, "step": 1}', "\0"])
def test_a_broken_index_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    store = SampleStore(tmp_path)
    step(store, 1)
    file = tmp_path / "step_000001.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"step_000001\.jsonl:3 is no line of an index"):
        list(read_samples(tmp_path))


def test_each_line_is_plain_json(tmp_path: Path) -> None:
    step(SampleStore(tmp_path), 1)
    lines = [json.loads(line) for line in (tmp_path / "step_000001.jsonl").read_text().splitlines()]
    assert [line["prompt"]["index"] for line in lines] == [2, 3]
    assert lines[0]["samples"][1]["stop_reason"] == "length"
