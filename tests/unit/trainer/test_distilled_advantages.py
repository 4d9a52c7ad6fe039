"""A teacher's log-probs at their places, in every cut of a pack, and what becomes of them as advantages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.data.packing import collate
from gspo_megatron.data.samples import build_samples, select
from gspo_megatron.data.store import DamagedSample, SampleStore
from gspo_megatron.objective import BatchTotals
from gspo_megatron.policy.attention import zigzag_indices
from gspo_megatron.policy.policy import Scored
from gspo_megatron.trainer.batches import MiniBatch, ScoredMicroBatch
from gspo_megatron.trainer.distilled_advantages import with_teacher_advantages
from gspo_megatron.trainer.training_loss import make_loss
from gspo_megatron.types import Masked, Problem, Prompt, Response, SampleRef, Segment


def write(store: SampleStore, sample: int, prompt: int, answer: int, *masked: Masked, taught: bool = True) -> SampleRef:
    """A response whose k-th token has the log-probs -k of the sampler and -10 - k of the teacher."""
    steps = np.arange(answer, dtype=np.float32)
    said = -10 - steps
    for span in masked:
        said[span.start : span.end] = 0
    return store.write(
        Prompt(0, Problem("p", "q", {}), tuple(range(prompt))),
        Response(0, sample, np.arange(answer, dtype=np.int32), -steps, (Segment(0, 0, answer),), "stop", masked=masked,
                 teacher_logprobs=said if taught else None),
        0.5,
    )  # fmt: skip


def scored(store: SampleStore, refs: list[SampleRef], context: int, rank: int) -> ScoredMicroBatch:
    """This rank's part of one pack; its old policy gives -1 everywhere."""
    packed = collate(build_samples(refs, store), 4 * context)
    starts = torch.as_tensor(packed.cu_seqlens)
    keep = zigzag_indices(starts, rank, context)
    batch: Any = SimpleNamespace(
        params=SimpleNamespace(cu_seqlens_q=starts), indices=keep, loss_mask=torch.as_tensor(packed.loss_mask)[keep],
        cu_seqlens=starts // context, rollout_logprobs=torch.as_tensor(packed.rollout_logprobs)[keep],
        share=SimpleNamespace(sum=lambda values: values),
    )  # fmt: skip
    old = torch.full((len(keep),), -1.0)
    return ScoredMicroBatch(refs, batch, None, False, Scored(old, old), None)


def minibatch(micro: ScoredMicroBatch) -> MiniBatch[ScoredMicroBatch]:
    return MiniBatch([micro], BatchTotals(2, 6), BatchTotals(0, 0), is_first=False)


@pytest.mark.parametrize("context", [1, 2])
def test_each_trained_target_has_its_own_and_others_none(tmp_path: Path, context: int) -> None:
    store = SampleStore(tmp_path)
    refs = [write(store, 0, 3, 4, Masked(1, 2, "observation")), write(store, 1, 1, 3)]
    places: list[int] = []
    values: list[float] = []
    for rank in range(context):
        micro = scored(store, refs, context, rank)
        (ready,) = with_teacher_advantages([minibatch(micro)], store)
        places += micro.batch.indices.tolist()
        values += ready.micro_batches[0].advantages.tolist()
    whole = [value for _, value in sorted(zip(places, values, strict=True))]
    # The last token of the prompt predicts the first of the response; the second one was not sampled.
    assert whole[:8] == [0, 0, -9, 0, -11, -12, 0, 0]
    assert whole[8:12] == [-9, -10, -11, 0] and not any(whole[12:])


def test_a_rank_without_log_probs_and_a_filled_slot_have_zeros(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    refs = [write(store, 0, 3, 4)]
    elsewhere = replace(scored(store, refs, 1, 0), old=None)
    for micro in (elsewhere, scored(store, [], 1, 0)):
        (ready,) = with_teacher_advantages([minibatch(micro)], store)
        advantages = ready.micro_batches[0].advantages
        assert advantages.shape == micro.batch.loss_mask.shape and not advantages.any()


def test_a_record_without_them_is_named(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    refs = [write(store, 0, 3, 4, taught=False)]
    with pytest.raises(DamagedSample, match=r"written_000001\.bin@0 holds no log-probs of a teacher"):
        with_teacher_advantages([minibatch(scored(store, refs, 1, 0))], store)


def test_a_response_that_the_teacher_failed_is_in_no_denominator(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    refs = [write(store, 0, 3, 4), replace(write(store, 1, 3, 9, taught=False), teacher_fault="failed")]
    kept = select(refs)
    assert kept.refs == (refs[0],) and kept.dropped == {"no-teacher": 1}


def test_the_loss_takes_them_a_token(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    refs = [write(store, 0, 3, 4, Masked(1, 2, "observation")), write(store, 1, 1, 3)]
    (ready,) = with_teacher_advantages([minibatch(scored(store, refs, 1, 0))], store)
    micro = ready.micro_batches[0]
    assert micro.old is not None
    now = replace(micro.old, logprobs=micro.old.logprobs.clone().requires_grad_())
    share, metrics = make_loss(ObjectiveSpec.preset("distillation"), ready, [], [], [])(micro.batch, now, 0)
    share.backward()
    assert float(metrics["teacher_kl"]) == 9 + 11 + 12 + 9 + 10 + 11
    assert now.logprobs.grad is not None
    assert torch.allclose(now.logprobs.grad.double(), -micro.advantages / 6)
