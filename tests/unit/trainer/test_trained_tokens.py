"""What is kept of the training passes is what the loss saw."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.objective import LossOutput, policy_loss
from gspo_megatron.trainer.trained_tokens import trained_responses
from gspo_megatron.types import SampleRef
from tests.unit.objective.cases import as_answers, as_rows, known, loss_inputs, over_context, preset, totals_of, zigzag


@pytest.mark.parametrize("context", [1, 2])
def test_ratios_and_sides_of_every_response(context: int) -> None:
    """Three responses of a GSPO update: clipped on the left, clipped on the right, kept."""
    answers = as_answers([[-0.01, -0.03, 0.0, 0.0], [0.25, 0.125], [0.0, 1e-4, -1e-4]], [-1.0, 1.0, 1.0])
    rows, found = as_rows(answers), []
    refs = [SampleRef("", 7, at, 1, row.length, 0.0, "stop", ()) for at, row in enumerate(rows)]
    # A prompt of one token: places of the pack are those of the rows, each padded to a multiple of 4.
    starts = torch.tensor([0, 4, 8, 12])

    def one_rank(rank: int, add: Callable[[Tensor], Tensor]) -> LossOutput:
        inputs = loss_inputs(rows, totals_of(rows), context, rank)
        out = policy_loss(preset("gspo"), inputs, add)
        places = [
            int(start) + at
            for start, row in zip(starts, rows, strict=False)
            for at in zigzag(row.length, context, rank)
        ]
        batch = SimpleNamespace(
            params=SimpleNamespace(cu_seqlens_q=starts), indices=torch.tensor(places), loss_mask=inputs.loss_mask,
            rollout_logprobs=known(inputs.rollout_logprobs).float(), share=SimpleNamespace(rank=rank, sum=add),
        )  # fmt: skip
        micro = SimpleNamespace(batch=batch, refs=refs)
        update: Any = SimpleNamespace(
            minibatch=SimpleNamespace(micro_batches=[micro]), logprobs=[inputs.logprobs.detach()], clipped=[out.clipped]
        )
        found.append(list(trained_responses(update)))
        return out

    over_context(context, one_rank)
    assert [len(responses) for responses in found].count(0) == context - 1, "one rank has them all"
    for responses in filter(None, found):
        assert [(one.prompt_index, one.sample_index, one.left, one.right) for one in responses] == [
            (7, 0, 1.0, 0.0), (7, 1, 0.0, 1.0), (7, 2, 0.0, 0.0),
        ]  # fmt: skip
        for one, answer in zip(responses, answers, strict=True):
            assert one.log_ratios.tolist() == pytest.approx((answer.logp - known(answer.sampler)).tolist(), abs=2e-4)
