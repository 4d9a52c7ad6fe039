"""The learning rate of every update, against its formula in NumPy; extension and resume."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.config.optimizer_section import OptimizerSection
from gspo_megatron.models import load_recipe
from gspo_megatron.plan.run_plan import check
from tests.places import ROOT

TINY = ROOT / "recipes" / "tiny_moe.yaml"
CASES = settings(max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10, deadline=None, print_blob=True)


def formula(lr: float, schedule: str, warmup: int, final: float, total: int) -> np.ndarray:
    """[total] float64: rates of updates 1 to `total`."""
    update = np.arange(1, total + 1, dtype=np.float64)
    warm = np.minimum(1, update / max(1, warmup))
    done = np.clip((update - warmup) / max(1, total - warmup), 0, 1)
    decay = {"constant": np.zeros_like(done), "linear": done, "cosine": np.sin(np.pi * done / 2) ** 2}[schedule]
    return lr * warm * (1 - (1 - final) * decay)


@CASES
@given(
    schedule=st.sampled_from(["constant", "cosine", "linear"]), warmup=st.integers(0, 60), total=st.integers(1, 50),
    final=st.floats(0, 1), lr=st.floats(1e-9, 1e-2),
)  # fmt: skip
def test_every_update_follows_the_formula(schedule, warmup: int, total: int, final: float, lr: float) -> None:
    section = OptimizerSection(lr=lr, schedule=schedule, warmup_updates=warmup, final_fraction=final)
    rates = np.array([section.learning_rate(update, total) for update in range(1, total + 1)])
    np.testing.assert_allclose(rates, formula(lr, schedule, warmup, final, total), rtol=1e-12, atol=lr * 1e-15)
    assert (np.diff(rates[warmup:]) <= lr * 1e-15).all() and (np.diff(rates[:warmup]) >= 0).all()


def test_constant_keeps_the_bits_of_today() -> None:
    section = OptimizerSection(lr=3e-5, warmup_updates=7)
    for update in range(1, 40):
        assert section.learning_rate(update, 20) == 3e-5 * min(1.0, update / max(1, 7))


def test_the_ends_are_exact_and_a_run_beyond_its_length_stays_there() -> None:
    section = OptimizerSection(lr=1e-3, schedule="cosine", warmup_updates=4, final_fraction=0.1)
    assert section.learning_rate(4, 20) == 1e-3
    assert section.learning_rate(20, 20) == pytest.approx(1e-4, rel=1e-12)
    assert section.learning_rate(25, 20) == section.learning_rate(20, 20)
    assert OptimizerSection(lr=1e-3, schedule="linear").learning_rate(8, 8) == 0


def test_a_resumed_run_continues_and_an_extended_one_follows_the_longer_schedule() -> None:
    """The rate is a function of the update's number, which a checkpoint holds, and of the recipe's length."""
    short, long = (load_recipe(TINY, ["optimizer.schedule=linear", f"trainer.max_steps={n}"]) for n in (10, 20))
    assert (short.total_updates, long.total_updates) == (10 * short.batch.updates, 20 * short.batch.updates)
    update = short.total_updates // 2
    rates = [recipe.optimizer.learning_rate(update, recipe.total_updates) for recipe in (short, long)]
    assert rates[0] < rates[1]


def test_the_plan_says_the_schedule_and_what_has_no_effect() -> None:
    section = OptimizerSection(lr=1e-6, schedule="cosine", warmup_updates=10, final_fraction=0.1)
    assert section.describe(400) == "warm-up over 10 updates to 1e-06, then cosine to 1e-07 at update 400"
    assert OptimizerSection().describe(400) == "1e-06, constant, 400 updates"
    codes = {finding.code for finding in check(load_recipe(TINY, ["optimizer.final_fraction=0.1"]), 2)}
    assert "final-fraction-inert" in codes
    codes = {finding.code for finding in check(load_recipe(TINY, ["optimizer.schedule=cosine"]), 2)}
    assert not codes & {"final-fraction-inert", "warmup-beyond-run"}


def test_in_the_warm_up_of_the_critic_only_its_head_learns() -> None:
    changes = ["objective.preset=ppo", "critic.lr=1e-2", "critic.warmup_steps=2", "optimizer.schedule=linear"]
    recipe = load_recipe(TINY, changes)
    each, total, optimizer = recipe.batch.updates, recipe.total_updates, recipe.optimizer
    rates = [recipe.critic.learning_rates(optimizer, update, total, each) for update in range(1, total + 1)]
    alone = [optimizer.learning_rate(update, total) for update in range(1, total + 1)]
    assert [policy for policy, _ in rates] == [0.0] * (2 * each) + alone[2 * each :]
    assert [head for _, head in rates] == pytest.approx([rate * 1e-2 / optimizer.lr for rate in alone], rel=1e-12)
    without = recipe.critic.model_copy(update={"lr": None, "warmup_steps": 0})
    assert without.learning_rates(optimizer, 30, total, each) == (alone[29], alone[29])
