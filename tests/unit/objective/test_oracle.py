"""Every preset against the float64 oracle: values and gradients, drawn cases, finite differences."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.objective import BatchTotals, LossInputs, policy_loss
from tests import reference
from tests.unit.objective.cases import (
    EXAMPLES,
    PRESET_NAMES,
    Layout,
    as_rows,
    assert_same,
    engine,
    preset,
    random_answers,
)

# Spreads of the mean log-ratio at which each preset meets both sides of its band.
SPREAD = {"gspo": 5e-4, "gspo_token": 5e-4, "luspo": 3e-3}
DETACHED = ("cispo", "minpro", "minirl")


@pytest.mark.parametrize("name", PRESET_NAMES)
@EXAMPLES
@given(seed=st.integers(0, 2**31), prompts=st.integers(0, 2**31))
def test_a_preset_is_its_formula(name: str, seed: int, prompts: int) -> None:
    answers = random_answers(seed, SPREAD.get(name, 0.3))
    value, grads = reference.gradients(reference.OBJECTIVES[name], answers)
    got, got_grads, _ = engine(preset(name), as_rows(answers, prompts))
    assert got == pytest.approx(value, abs=1e-12)
    assert_same(got_grads, grads, 1e-12)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_both_sides_of_the_band_are_met(name: str) -> None:
    """The cases above clip on the left, on the right and not at all, or the agreement would say little."""
    sums = [engine(preset(name), as_rows(random_answers(seed, SPREAD.get(name, 0.3))))[2] for seed in range(10)]
    if preset(name).trust in ("clip", "mask", "log_clip"):
        assert sum(s["clip_low_tokens"] for s in sums) > 0
        assert sum(s["clip_high_tokens"] for s in sums) > 0
    assert sum(s["zero_tokens"] for s in sums) < sum(s["tokens"] for s in sums)


@pytest.mark.parametrize("name", [name for name in PRESET_NAMES if name not in DETACHED])
@settings(EXAMPLES, max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_the_gradient_is_the_slope_of_the_value(name: str, seed: int) -> None:
    """Central differences of the engine's own value; presets that freeze their weights have no such slope."""
    answers, step = random_answers(seed, SPREAD.get(name, 0.3), count=3, longest=5), 1e-7
    spec = preset(name)
    _, grads, _ = engine(spec, as_rows(answers))
    for answer, grad in zip(answers, grads, strict=True):
        for t in range(answer.length):
            here = answer.logp.clone()
            sides = []
            for sign in (1, -1):
                answer.logp = here.clone()
                answer.logp[t] += sign * step
                sides.append(engine(spec, as_rows(answers)))
            answer.logp = here
            if sides[0][2]["zero_tokens"] != sides[1][2]["zero_tokens"]:
                continue  # the edge of the band lies between the two sides
            assert (sides[0][0] - sides[1][0]) / (2 * step) == pytest.approx(float(grad[t]), abs=2e-7)


def test_gspo_has_the_gradient_of_gspo_token_in_2000_cases() -> None:
    """One advantage a sequence: the engine in both forms, and the printed formula through the mean, agree."""
    clipped = passed = 0
    for seed in range(2000):
        answers = random_answers(seed, 5e-4, count=2, longest=4)
        sequence = engine(preset("gspo"), as_rows(answers))
        token = engine(preset("gspo_token"), as_rows(answers), Layout([[0, 1]], token_advantages=True))
        value, grads = reference.gradients(reference.gspo, answers)
        assert sequence[0] == pytest.approx(value, abs=1e-12)
        assert token[0] == pytest.approx(value, abs=1e-12)
        assert_same(sequence[1], grads, 1e-12)
        assert_same(token[1], grads, 1e-12)
        clipped += round(sequence[2]["clip_low_sequences"] + sequence[2]["clip_high_sequences"])
        passed += 2 - round(sequence[2]["clip_low_sequences"] + sequence[2]["clip_high_sequences"])
    assert clipped > 500 and passed > 500


@EXAMPLES
@given(seed=st.integers(0, 2**31))
def test_with_token_advantages_gspo_token_is_its_own_algorithm(seed: int) -> None:
    answers = random_answers(seed, 5e-4, longest=6, token_advantages=True)
    layout = Layout([list(range(len(answers)))], token_advantages=True)
    value, grads = reference.gradients(reference.gspo_token, answers)
    got, got_grads, _ = engine(preset("gspo_token"), as_rows(answers), layout)
    assert got == pytest.approx(value, abs=1e-12)
    assert_same(got_grads, grads, 1e-12)


def test_with_token_advantages_the_gradient_through_the_mean_differs() -> None:
    answers = random_answers(3, 1e-5, longest=6, token_advantages=True)
    direct, direct_grads = reference.gradients(reference.sequence_direct_with_token_advantages, answers)
    got, got_grads, _ = engine(
        preset("gspo_token"), as_rows(answers), Layout([list(range(len(answers)))], token_advantages=True)
    )
    assert got == pytest.approx(direct, abs=1e-12)
    assert max(float((a - b).abs().max()) for a, b in zip(got_grads, direct_grads, strict=True)) > 1e-2


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_before_any_update_every_ratio_is_one(name: str) -> None:
    """log s is exactly 0, nothing is clipped, and the gradient is the plain policy gradient."""
    answers = random_answers(11)
    for answer in answers:
        answer.logp = answer.old.clone()
        answer.sampler = answer.old.clone()
    value, grads, sums = engine(preset(name), as_rows(answers))
    assert sums["log_s_abs/max"] == 0.0 and sums["log_s"] == 0.0
    assert sums["clip_low_tokens"] == sums["clip_high_tokens"] == 0
    aggregation = preset(name).aggregation
    tokens = sum(a.length for a in answers)
    for answer, grad in zip(answers, grads, strict=True):
        weight = {
            "seq_mean_token_mean": 1 / (len(answers) * answer.length),
            "token_mean": 1 / tokens,
            "seq_mean_token_sum": 1 / len(answers),
            "constant": 1 / (len(answers) * 16),
        }[aggregation]
        assert_same([grad], [answer.advantage * weight], 1e-15)
    if aggregation == "seq_mean_token_mean" and name != "sapo":
        assert value == pytest.approx(sum(float(a.advantage[0]) for a in answers) / len(answers), abs=1e-15)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3_unbiased"])
def test_a_divergence_in_the_loss_is_its_estimator(kind: str) -> None:
    spec = preset("grpo").replace(kl=kind, kl_coefficient=0.05)

    def objective(answers: Sequence[reference.Response]) -> torch.Tensor:
        def charge(a: reference.Response, t: int) -> torch.Tensor:
            assert a.reference is not None
            x = a.logp[t] - a.reference[t]
            k3 = torch.exp(-x) - 1 + x
            w = torch.exp(a.logp[t] - a.old[t])
            return {"k1": x, "k2": x * x / 2, "k3": k3, "k3_unbiased": w * k3}[kind]

        charged = reference.sequence_mean(answers, lambda a: reference.token_terms(a, charge) / a.length)
        return reference.grpo(answers) - 0.05 * charged

    answers = random_answers(5, 0.3)
    value, grads = reference.gradients(objective, answers)
    got, got_grads, _ = engine(spec, as_rows(answers, 1))
    assert got == pytest.approx(value, abs=1e-12)
    assert_same(got_grads, grads, 1e-12)


def test_the_mean_log_ratio_of_100k_tokens_is_exact_in_float32() -> None:
    """Error of log s below 1e-8 against float64 arithmetic on the same numbers, at log-probs down to -20."""
    draw = torch.Generator().manual_seed(0)
    length = 100_000
    old = (torch.rand(length, generator=draw).log() * 3).clamp(min=-20)
    new = old + 0.02 * torch.randn(length, generator=draw) - 1e-4
    leaf = new.clone().requires_grad_()
    inputs = LossInputs(
        leaf, old, torch.tensor([1.0]), torch.ones(length, dtype=torch.bool), torch.tensor([0, length]),
        BatchTotals(1, length),
    )  # fmt: skip
    exact = float((new.double() - old.double()).mean())
    out = policy_loss(preset("gspo"), inputs)
    assert abs(float(out.metrics["log_s"]) - exact) < 1e-12
    assert abs(float(out.loss.detach()) + float(torch.tensor(exact, dtype=torch.float64).exp())) < 2e-7
