"""The critic of PPO: its loss, its advantages and what is logged of it, against float64 arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gspo_megatron.objective import ObjectiveSpec, add_sums, finalize_step, generalized_advantages, normalize_tokens
from gspo_megatron.objective.inputs import LossInputs
from gspo_megatron.objective.loss import policy_loss
from tests import reference
from tests.unit.objective.cases import (
    EXAMPLES,
    FIXTURES,
    Layout,
    Row,
    as_rows,
    as_sums,
    assert_same,
    check_grads,
    engine,
    loss_inputs,
    near,
    over_context,
    preset,
    random_answers,
    totals_of,
)

PPO = FIXTURES["PPO"]


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def value_gradients(spec: ObjectiveSpec, rows: list[Row], layout: Layout) -> tuple[float, list[Tensor], list[Tensor]]:
    """(J, dJ/dV, dJ/dlogp) of each answer by the engine, in a layout."""
    totals, losses = totals_of(rows), []
    for indices in layout.microbatches:
        part = [rows[i] for i in indices]
        outputs = over_context(
            layout.context,
            lambda rank, add, part=part: policy_loss(
                spec, loss_inputs(part, totals, layout.context, rank, token_advantages=True), add
            ),
        )
        losses += [out.loss.double() for out in outputs]
    leaves = [row.value for row in rows if row.value is not None]
    loss = torch.stack(losses).sum()
    found = torch.autograd.grad(loss, [*leaves, *(row.leaf for row in rows)])
    return -loss.item(), [-g for g in found[: len(rows)]], [-g for g in found[len(rows) :]]


def printed_answers() -> list[reference.Response]:
    def row(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    columns = ("log_ratio", "normalised", "values", "old_values", "returns")
    return [
        reference.Response(
            row(d) - 1.3, row(d) * 0 - 1.3, row(a), row(d) * 0 - 1.3, None, row(v), row(old), row(target)
        )
        for d, a, v, old, target in zip(*(PPO[name] for name in columns), strict=True)
    ]


@pytest.mark.parametrize("layout", [Layout([[0, 1]]), Layout([[0], [1]]), Layout([[1, 0]], 2)])
def test_printed_vectors(layout: Layout) -> None:
    spec = preset("ppo").replace(value_clip=PPO["value_clip"], clip_low=PPO["eps"], clip_high=PPO["eps"])
    rows = as_rows(printed_answers(), seed=1)
    value, of_values, of_logprobs = value_gradients(spec, rows, layout)
    assert value == near(PPO["surrogate"] - spec.value_coefficient * PPO["value_loss"])
    check_grads(of_logprobs, PPO["dJ_dlogp"])
    check_grads([-g / spec.value_coefficient for g in of_values], PPO["dL_dV"])
    sums = engine(spec, as_rows(printed_answers()), layout)[2]
    assert sums["value_loss"] == near(PPO["value_loss"]) and sums["value_clipped"] == PPO["value_clipped"]


def test_printed_advantages() -> None:
    rewards, values = (torch.tensor(flat(PPO[name]), dtype=torch.float64) for name in ("rewards", "old_values"))
    starts, every = torch.tensor([0, 3, 5]), torch.ones(5, dtype=torch.bool)
    plain = generalized_advantages(rewards, values, every, starts, PPO["discount"], PPO["decay"])
    assert plain.tolist() == [near(a) for a in flat(PPO["advantages"])]
    assert (plain + values).tolist() == [near(r) for r in flat(PPO["returns"])]
    (normalised,) = normalize_tokens([plain], [every], lambda values: values, 0, 0.0)
    assert normalised.tolist() == [near(a) for a in flat(PPO["normalised"])]


@EXAMPLES
@given(
    seed=st.integers(0, 2**31), context=st.sampled_from([1, 2, 4]), coefficient=st.sampled_from([0.1, 1.0]),
    width=st.sampled_from([0.05, 0.3]),
)  # fmt: skip
def test_values_and_log_probs_get_the_gradients_of_the_formula(
    seed: int, context: int, coefficient: float, width: float
) -> None:
    answers = random_answers(seed, 0.3, token_advantages=True)
    spec = preset("ppo").replace(value_coefficient=coefficient, value_clip=width)
    leaves = [known.value.clone().requires_grad_() for known in answers if known.value is not None]
    moved = [
        replace(a, value=leaf, logp=a.logp.clone().requires_grad_()) for a, leaf in zip(answers, leaves, strict=True)
    ]
    wanted = reference.dapo(moved, 0.2, 0.2) - coefficient * reference.value_error(moved, width)
    used = [*leaves, *(a.logp for a in moved)]
    # Where every token is beyond its band, the formula does not depend on an answer at all.
    grads = torch.autograd.grad(wanted, used, allow_unused=True, materialize_grads=True)
    layout = Layout([[3, 0], [], [1, 2, 4, 5]], context)
    value, of_values, of_logprobs = value_gradients(spec, as_rows(answers, seed), layout)
    assert value == pytest.approx(wanted.item(), abs=1e-12)
    assert_same(of_values, grads[: len(answers)], 1e-12)
    assert_same(of_logprobs, grads[len(answers) :], 1e-12)


def test_both_sides_of_the_value_band_are_met() -> None:
    sums = add_sums([as_sums(engine(preset("ppo"), as_rows(random_answers(seed, 0.3)))[2]) for seed in range(10)])
    assert 0 < float(sums["value_clipped"]) < float(sums["tokens"]) / 2


@EXAMPLES
@given(seed=st.integers(0, 2**31))
def test_with_token_form_ratios_the_critic_weighs_like_the_policy(seed: int) -> None:
    """GSPO-token with the critic's advantages: both parts are means over tokens, then over sequences."""
    answers = random_answers(seed, 5e-4, token_advantages=True)
    spec = preset("gspo_token").replace(advantage="gae", value_coefficient=0.3)
    value, _, of_logprobs = value_gradients(spec, as_rows(answers, seed), Layout([list(range(len(answers)))]))
    policy, grads = reference.gradients(reference.gspo_token, answers)
    critic = sum(float(reference.value_error([answer])) for answer in answers) / len(answers)
    assert value == pytest.approx(policy - 0.3 * critic, abs=1e-12)
    assert_same(of_logprobs, grads, 1e-12)


@EXAMPLES
@given(
    seed=st.integers(0, 2**31), discount=st.sampled_from([1.0, 0.97]), decay=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    ddof=st.sampled_from([0, 1]),
)  # fmt: skip
def test_advantages_of_drawn_packs(seed: int, discount: float, decay: float, ddof: int) -> None:
    """The recursion against the sum over all later errors, then over the std of all packs; prompts and tool output lie
    between the tokens, one response has none."""
    draw = torch.Generator().manual_seed(seed)
    packs, masks, wanted = [], [], []
    for _ in range(3):
        lengths = torch.randint(1, 9, (4,), generator=draw).tolist()
        starts = torch.tensor([0, *lengths]).cumsum(0)
        mask = torch.rand(int(starts[-1]), generator=draw) < 0.7
        mask[: lengths[0]] = False
        rewards, values = torch.randn(2, len(mask), generator=draw, dtype=torch.float64)
        packs.append(generalized_advantages(rewards, values, mask, starts, discount, decay))
        masks.append(mask)
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            own = mask[start:end]
            one, _ = reference.generalized(
                rewards[start:end][own].tolist(), values[start:end][own].tolist(), discount, decay
            )
            assert packs[-1][start:end][own].tolist() == pytest.approx(one, abs=1e-12)
            wanted.append(one)
    normalised = normalize_tokens(packs, masks, lambda values: values, ddof, 1e-3)
    expected = flat(reference.over_their_std(wanted, ddof, 1e-3))
    assert torch.cat([a[m] for a, m in zip(normalised, masks, strict=True)]).tolist() == pytest.approx(
        expected, abs=1e-12
    )
    assert all(bool((a[~m] == 0).all()) for a, m in zip(normalised, masks, strict=True))


@pytest.mark.parametrize("level", [0.0, 0.1, -1e6])
def test_equal_advantages_are_zero(level: float) -> None:
    every = torch.ones(7, dtype=torch.bool)
    equal = [torch.full((7,), level, dtype=torch.float64)] * 3
    parts = normalize_tokens(equal, [every] * 3, lambda values: values, 0, 0.0)
    assert all(part.tolist() == [0.0] * 7 for part in parts)


def test_what_is_logged_of_the_critic() -> None:
    """Two equal mini-batches of the printed case: the loss is their mean, the rest over all tokens."""
    sums = as_sums(engine(preset("ppo"), as_rows(printed_answers()))[2])
    logged = finalize_step([sums, sums])
    old, target = flat(PPO["old_values"]), flat(PPO["returns"])

    def variance(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((v - mean) ** 2 for v in values) / len(values)

    gaps = [r - v for r, v in zip(target, old, strict=True)]
    assert logged["value_loss"] == near(PPO["value_loss"])
    assert logged["value_clipped"] == near(PPO["value_clipped"] / 5)
    assert logged["value_mean"] == near(sum(old) / 5) and logged["return_mean"] == near(sum(target) / 5)
    assert logged["explained_variance"] == near(1 - variance(gaps) / variance(target))


def test_a_critic_that_knows_the_returns_explains_all_of_them() -> None:
    answers = random_answers(2)
    known = [replace(a, old_value=a.returns) for a in answers]
    sums = as_sums(engine(preset("ppo"), as_rows(known))[2])
    assert finalize_step([sums])["explained_variance"] == 1.0
    equal = [replace(a, returns=torch.full_like(a.logp, 0.5)) for a in answers]
    assert finalize_step([as_sums(engine(preset("ppo"), as_rows(equal))[2])])["explained_variance"] == 0.0


def test_what_a_critic_needs_is_asked_for() -> None:
    rows = as_rows(random_answers(1))
    given = loss_inputs(rows, totals_of(rows), token_advantages=True)
    fields = {name: getattr(given, name) for name in LossInputs.__slots__}
    with pytest.raises(ValueError, match="returns is None, but advantage=gae trains a critic"):
        policy_loss(preset("ppo"), LossInputs(**{**fields, "returns": None}))
    with pytest.raises(ValueError, match="advantage=gae takes one a token"):
        policy_loss(preset("ppo"), loss_inputs(rows, totals_of(rows)))
    broken = given.values.detach().clone() if given.values is not None else torch.empty(0)
    broken[3] = math.nan
    with pytest.raises(ValueError, match=r"values \[\d+\] is nan at trained position 3"):
        policy_loss(preset("ppo"), LossInputs(**{**fields, "values": broken}))


def test_no_gradient_reaches_what_the_advantages_came_from() -> None:
    rows = as_rows(random_answers(1))
    given = loss_inputs(rows, totals_of(rows), token_advantages=True)
    fields = {name: getattr(given, name) for name in LossInputs.__slots__}
    leaves = {name: fields[name].detach().clone().requires_grad_() for name in ("old_values", "returns", "advantages")}
    policy_loss(preset("ppo"), LossInputs(**{**fields, **leaves})).loss.backward()
    assert [leaf.grad for leaf in leaves.values()] == [None, None, None]
