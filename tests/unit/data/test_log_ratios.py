"""Log-ratios beside the samples: what was written is read, and goes with its step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gspo_megatron.data.log_ratios import TRAINED, TrainedResponse, find_log_ratios, write_log_ratios
from gspo_megatron.data.store import SampleStore
from gspo_megatron.types import Problem, Prompt, Response, Segment


def response(prompt: int, sample: int, *ratios: float, left: float = 0.0, right: float = 0.0) -> TrainedResponse:
    return TrainedResponse(prompt, sample, left, right, np.array(ratios, np.float16))


def test_what_the_ranks_wrote_is_read(tmp_path: Path) -> None:
    write_log_ratios(tmp_path, 3, 0, [response(7, 0, 0.5, -0.25, left=1.0), response(7, 1)])
    write_log_ratios(tmp_path, 3, 5, [response(2**40, 3, -1e-3, right=0.5)])
    write_log_ratios(tmp_path, 3, 6, [])
    found = find_log_ratios(tmp_path, 3)
    assert {key: (one.left, one.right, one.length) for key, one in found.items()} == {
        (7, 0): (1.0, 0.0, 2), (7, 1): (0.0, 0.0, 0), (2**40, 3): (0.0, 0.5, 1),
    }  # fmt: skip
    assert found[7, 0].read().tolist() == [0.5, -0.25] and found[7, 1].read().tolist() == []
    assert found[2**40, 3].read().tolist() == [float(np.float16(-1e-3))]
    assert find_log_ratios(tmp_path, 4) == {}


@pytest.mark.parametrize("size", [0, 5, 11, 20, 43])
def test_a_file_that_is_cut_is_left_out(tmp_path: Path, size: int) -> None:
    write_log_ratios(tmp_path, 3, 0, [response(7, 0, 0.5)])
    write_log_ratios(tmp_path, 3, 1, [response(8, 0, 0.25)])
    file = tmp_path / TRAINED.name(3) / "rank_00000.bin"
    file.write_bytes(file.read_bytes()[:size])
    assert find_log_ratios(tmp_path, 3).keys() == {(8, 0)}


def test_a_response_whose_tokens_are_cut_says_so(tmp_path: Path) -> None:
    write_log_ratios(tmp_path, 3, 0, [response(7, 0, 0.5, 0.5)])
    one = find_log_ratios(tmp_path, 3)[7, 0]
    one.file.write_bytes(one.file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends before byte"):
        one.read()
    one.file.unlink()
    with pytest.raises(OSError, match="No such file"):
        one.read()


def test_they_go_with_the_samples_of_their_step(tmp_path: Path) -> None:
    store, prompt = SampleStore(tmp_path), Prompt(0, Problem("p", "1 + 1", {}), (5,))
    mine = tmp_path / "trained_000001_mine"
    for step in (1, 2, 3):
        ids, logprobs = np.array([5], np.int32), np.zeros(1, np.float32)
        ref = store.write(prompt, Response(0, 0, ids, logprobs, (Segment(0, 0, 1),), "stop"), 0.0)
        store.finish_step(step, [(prompt, [ref])], (), keep=2)
        write_log_ratios(tmp_path, step, 0, [response(0, 0, 0.5)])
        mine.mkdir(exist_ok=True)
    assert list(TRAINED.find(tmp_path)) == [2, 3] and mine.is_dir()
    store.finish_step(2, [(prompt, [ref])], (), keep=None)  # of an attempt that goes on from step 1
    assert list(TRAINED.find(tmp_path)) == [2]
