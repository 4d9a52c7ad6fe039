"""Which objectives let the trainer leave out passes, and that what is left out changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gspo_megatron.config.presets import PRESETS
from gspo_megatron.objective import BatchTotals, LossInputs, ObjectiveSpec, policy_loss

WHOLE = {"gspo", "gspo_token", "luspo"}
"""Presets that take the gradient of whole sequences."""


@pytest.mark.parametrize("name", PRESETS)
def test_a_reason_for_every_preset_that_keeps_its_gradients(name: str) -> None:
    spec = ObjectiveSpec.preset(name)
    assert (spec.keeps_every_gradient == "") == (name in WHOLE)
    for correction in ("geometric_mask", "opsm", "trust_region_mask", "veto"):
        assert (spec.replace(correction=[correction]).keeps_every_gradient == "") != spec.has_critic


def far_inputs(gap: float) -> LossInputs:
    """Two sequences; the first is beyond the band by `gap` nats on the side that stops it."""
    logprobs = torch.tensor([-1.0, -2.0, -1.5, -0.5], dtype=torch.float64)
    return LossInputs(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=logprobs.detach() - torch.tensor([gap, gap, 0, 0]),
        advantages=torch.tensor([1.0, -1.0]),
        loss_mask=torch.ones(4, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 2, 4]),
        totals=BatchTotals(2, 4),
        rollout_logprobs=logprobs.detach() - 0.1,
        token_advantages=False,
    )


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_a_clipped_sequence_has_no_gradient_at_all(name: str) -> None:
    inputs = far_inputs(1.0)
    policy_loss(ObjectiveSpec.preset(name), inputs).loss.backward()
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad[:2].tolist() == [0, 0]
    assert (inputs.logprobs.grad[2:] != 0).all()


def test_against_the_sampler_old_logprobs_are_for_metrics_only() -> None:
    spec = ObjectiveSpec.preset("gspo").replace(ratio_reference="sampler", clip_low=0.2, clip_high=0.2)
    assert spec.requires_old_logprobs == ""
    given = far_inputs(0.3)
    without = replace(given, old_logprobs=None)
    with_old, alone = (policy_loss(spec, one) for one in (given, without))
    assert float(alone.loss.detach()) == float(with_old.loss.detach())
    assert float(alone.metrics["compared_sequences"]) == 0 < float(with_old.metrics["compared_sequences"])
    empty = {name for name in alone.metrics if name.startswith(("policy_", "mismatch_", "compared_"))}
    for name, value in alone.metrics.items():
        assert torch.equal(value, torch.zeros_like(value) if name in empty else with_old.metrics[name]), name


def test_a_mask_by_the_drift_from_the_sampler_reads_no_old_logprobs() -> None:
    """Trust region masking as published: the ratio against the sampler, and no pass of the old policy."""
    spec = ObjectiveSpec.preset("gspo").replace(ratio_reference="sampler", correction=["trust_region_mask", "opsm"])
    assert spec.requires_old_logprobs == ""
    given = far_inputs(0.3)
    with_old, alone = (policy_loss(spec, one) for one in (given, replace(given, old_logprobs=None)))
    assert float(alone.loss.detach()) == float(with_old.loss.detach())


def test_interpolated_logprobs_take_the_place_of_the_old_ones() -> None:
    spec = ObjectiveSpec.preset("grpo").replace(ratio_reference="interpolated", correction=["tis"])
    assert spec.requires_old_logprobs == ""
    given = replace(far_inputs(0.3), staleness=torch.tensor([0.0, 1, 2, 0]))
    with_old, alone = (policy_loss(spec, one) for one in (given, replace(given, old_logprobs=None)))
    assert float(alone.loss.detach()) == float(with_old.loss.detach())
    with pytest.raises(ValueError, match="staleness is None, but ratio_reference=interpolated weighs by it"):
        policy_loss(spec, far_inputs(0.3))


@pytest.mark.parametrize(
    "changes",
    [{}, {"ratio_reference": "sampler", "correction": ["tis"]}, {"ratio_reference": "sampler", "replay": "trainer"}],
)
def test_old_logprobs_are_required_where_something_reads_them(changes: dict[str, object]) -> None:
    spec = ObjectiveSpec.preset("gspo").replace(**changes)
    with pytest.raises(ValueError, match="old_logprobs is None, but"):
        policy_loss(spec, replace(far_inputs(0.0), old_logprobs=None))
