"""The plan says which passes are left out, and counts them as the closed form does."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.estimate.passes import passes_of

TINY = Path("recipes/tiny_moe.yaml")


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["objective.kl=k3", "objective.kl_coefficient=0.01"], "zero-gradients-kept", "kl=k3"),
        (["objective.preset=grpo"], "clipped-sequences-kept", "ratio_level=token"),
        (["objective.preset=sapo"], "clipped-sequences-kept", "trust=soft_gate"),
        (["trainer.megatron.overlap_grad_reduce=true"], "clipped-sequences-kept", "overlap_grad_reduce"),
        ([], "", ""),
        (["objective.preset=grpo", "trainer.skip_zero_gradients=false"], "", ""),
    ],
)
def test_what_stays_in_the_passes_is_said(overrides: list[str], code: str, words: str) -> None:
    findings = make_plan(load_recipe(TINY, overrides)).findings
    found = {finding.code: finding for finding in findings if finding.key == "trainer.skip_zero_gradients"}
    assert list(found) == ([code] if code else [])
    assert all(finding.severity == "info" and words in finding.message for finding in found.values())


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["trainer.recompute=full"], 2.6475),
        (["trainer.recompute=full", "objective.ratio_reference=sampler"], 2.1975),
        (["trainer.recompute=full", "objective.ratio_reference=sampler", "objective.replay=sampler"], 2.1975),
        # Whole micro-batches only, which a plan does not count on.
        (["trainer.recompute=full", "trainer.pipeline_parallel=2", "trainer.ranks=2"], 2.85),
        (["trainer.recompute=full", "objective.preset=grpo"], 2.85),
        ([], 2.25),
    ],
)
def test_the_closed_form_of_a_recipe(overrides: list[str], wanted: float) -> None:
    recipe = load_recipe(TINY, ["batch.updates=4", *overrides])
    compute = make_plan(recipe).compute
    assert compute is not None
    assert passes_of(recipe, compute.forward_equivalents, 0.6, 0.15).total == pytest.approx(wanted)
