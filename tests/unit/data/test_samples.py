"""Samples: what is dropped and why, rows against their references, mini-batches of whole groups."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo_megatron.data.samples import build_samples, select, split
from gspo_megatron.types import SampleRef


def make_ref(prompt: int, sample: int = 0, answer: int = 3, stop: str = "stop") -> SampleRef:
    return SampleRef(f"{prompt}_{sample}.bin", prompt, sample, 2, answer, 1.0, stop, ())  # type: ignore[arg-type]


class Shelf:
    """A store in memory: prompt 7 7, then the answer 0 1 2 ..., log-probs -0 -1 -2 ..."""

    def read(self, ref: SampleRef) -> tuple[np.ndarray, int, np.ndarray]:
        answer = np.arange(ref.answer_length, dtype=np.int32)
        return np.concatenate([np.array([7, 7], dtype=np.int32), answer]), 2, -answer.astype(np.float32)

    def read_routes(self, ref: SampleRef) -> None:
        return None


def test_rows_by_hand() -> None:
    (row,) = build_samples([make_ref(0)], Shelf())
    assert row.token_ids.tolist() == [7, 7, 0, 1, 2]
    assert row.loss_mask.tolist() == [False, False, True, True, True]
    assert row.rollout_logprobs.tolist() == [0, 0, 0, -1, -2]
    assert (row.ref, row.token_ids.dtype) == (make_ref(0), np.int32)


def test_what_cannot_be_trained_is_counted() -> None:
    refs = [make_ref(0, 0), make_ref(0, 1, stop="abort"), make_ref(1, 0, answer=0), make_ref(1, 1, stop="length")]
    kept = select(refs)
    assert kept.refs == (refs[0], refs[3])
    assert kept.dropped == {"aborted": 1, "empty-answer": 1}
    assert select(refs[:1]).dropped == {}
    assert select([dataclasses.replace(refs[0], teacher_fault="failed"), refs[3]]).dropped == {"no-teacher": 1}


def test_a_file_that_contradicts_its_reference_is_named() -> None:
    class Wrong(Shelf):
        def read(self, ref: SampleRef) -> tuple[np.ndarray, int, np.ndarray]:
            return super().read(dataclasses.replace(ref, answer_length=ref.answer_length + 1))

    with pytest.raises(ValueError, match=r"5_0.bin holds .* \(2, 4, 4\) tokens, its reference says \(2, 3, 3\)"):
        build_samples([make_ref(5)], Wrong())


def test_a_log_prob_that_is_not_finite_is_named() -> None:
    class Broken(Shelf):
        def read(self, ref: SampleRef) -> tuple[np.ndarray, int, np.ndarray]:
            ids, start, logprobs = super().read(ref)
            return ids, start, np.full_like(logprobs, -np.inf)

    with pytest.raises(ValueError, match=r"5_0.bin holds a log-prob that is not finite"):
        build_samples([make_ref(5)], Broken())


def test_split_keeps_groups_whole_and_in_order() -> None:
    """Ragged groups, as they are after drops: the sample count is no multiple of anything."""
    refs = [make_ref(prompt, sample) for prompt, size in ((4, 3), (9, 1), (2, 2), (7, 4)) for sample in range(size)]
    assert [[ref.prompt_index for ref in part] for part in split(refs, 2)] == [[4, 4, 4, 9], [2, 2, 7, 7, 7, 7]]
    assert [len(part) for part in split(refs, 3)] == [4, 2, 4]
    rows = build_samples(refs, Shelf())
    assert [[row.ref for row in part] for part in split(rows, 2)] == split(refs, 2)


def test_split_of_too_few_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="1 groups are left for 2 updates"):
        split([make_ref(0, 0), make_ref(0, 1)], 2)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.data())
def test_split_loses_nothing(sizes: list[int], data: st.DataObject) -> None:
    updates = data.draw(st.integers(1, len(sizes)))
    refs = [make_ref(prompt, sample) for prompt, size in enumerate(sizes) for sample in range(size)]
    parts = split(refs, updates)
    assert [ref for part in parts for ref in part] == refs
    groups = [len({ref.prompt_index for ref in part}) for part in parts]
    assert sum(groups) == len(sizes)
    assert max(groups) - min(groups) <= 1
