"""On-policy distillation: advantages of a teacher, against float64 arithmetic and the exact reverse KL divergence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gspo_megatron.objective import (
    BatchTotals,
    LossInputs,
    finalize_step,
    policy_loss,
    runtime_warnings,
    teacher_advantages,
)
from tests import reference
from tests.unit.objective.cases import (
    EXAMPLES,
    Layout,
    Row,
    as_rows,
    as_sums,
    assert_same,
    engine,
    known,
    loss_inputs,
    preset,
    random_answers,
    totals_of,
)

SPEC = preset("distillation")


def taught(answers: list[reference.Response], seed: int) -> list[reference.Response]:
    """The same with a teacher, whose advantages are those of the package: garbage at untrained positions."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for answer in answers:
        teacher = answer.old + torch.randn(answer.length, generator=draw, dtype=torch.float64)
        row = Row(answer, answer.logp, list(range(1, answer.length + 1)), answer.length + 2)
        whole = teacher_advantages(row.full(teacher), row.full(answer.old), row.mask())
        assert whole[0] == whole[-1] == 0
        found.append(replace(answer, teacher=teacher, advantage=whole[1:-1]))
    return found


@EXAMPLES
@given(seed=st.integers(0, 2**31), context=st.sampled_from([1, 2, 4]))
def test_loss_gradients_and_divergence_are_those_of_the_formula(seed: int, context: int) -> None:
    answers = taught(random_answers(seed, 0.3), seed)
    value, grads = reference.gradients(reference.distillation, answers)
    for layout in (Layout([[0, 1, 2, 3, 4, 5]]), Layout([[3, 0], [], [1, 2, 4, 5]], context)):
        got, got_grads, sums = engine(SPEC, as_rows(answers, seed), layout)
        assert got == pytest.approx(value, abs=1e-12)
        assert_same(got_grads, grads, 1e-12)
        every = [float(old - said) for a in answers for old, said in zip(a.old, known(a.teacher), strict=True)]
        assert finalize_step([as_sums(sums)])["teacher_kl"] == pytest.approx(sum(every) / len(every), abs=1e-12)


def test_the_expected_gradient_is_that_of_the_reverse_divergence() -> None:
    """The sampled token's gradient, averaged over the vocabulary, at weights that have not moved."""
    draw = torch.Generator().manual_seed(5)
    logits, other = torch.randn(2, 7, generator=draw, dtype=torch.float64)
    logits.requires_grad_()
    mine, teacher = logits.log_softmax(0), other.log_softmax(0)
    (exact,) = torch.autograd.grad((mine.exp() * (mine - teacher)).sum(), logits, retain_graph=True)
    expected = torch.zeros(7, dtype=torch.float64)
    for token in range(7):
        now, every = mine[token : token + 1], torch.ones(1, dtype=torch.bool)
        advantages = teacher_advantages(teacher[token : token + 1], now.detach(), every)
        given = LossInputs(
            now, now.detach(), advantages, every, torch.tensor([0, 1]), BatchTotals(1, 1), token_advantages=True
        )
        (grad,) = torch.autograd.grad(policy_loss(SPEC, given).loss, logits, retain_graph=True)
        expected += mine[token].detach().exp() * grad
    assert torch.allclose(expected, exact, atol=1e-14, rtol=0)


def by_hand(advantages: list[float]) -> LossInputs:
    """Two sequences, of one and of two trained tokens; the policy has not moved."""
    old = torch.tensor([-9.0, -1.0, -2.0, -0.5], dtype=torch.float64)
    return LossInputs(
        old.clone().requires_grad_(), old, torch.tensor(advantages).double(),
        torch.tensor([False, True, True, True]), torch.tensor([0, 2, 4]), BatchTotals(2, 3), token_advantages=True,
    )  # fmt: skip


def test_by_hand() -> None:
    mask = torch.tensor([False, True, True, True])
    said = torch.tensor([float("nan"), -0.25, -2.5, -1.5])
    advantages = teacher_advantages(said, torch.tensor([-9.0, -1.0, -2.0, -0.5]), mask)
    assert advantages.tolist() == [0.0, 0.75, -0.5, -1.0] and advantages.dtype == torch.float64
    given = by_hand(advantages.tolist())
    out = policy_loss(SPEC, given)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.25) and known(given.logprobs.grad).tolist() == pytest.approx(
        [0, -0.25, 0.5 / 3, 1 / 3]
    )
    logged = finalize_step([out.metrics])
    assert logged["teacher_kl"] == pytest.approx(0.25)


def test_sequences_of_one_advantage_are_refused() -> None:
    rows = as_rows(random_answers(1))
    with pytest.raises(ValueError, match="advantage=teacher takes one a token"):
        policy_loss(SPEC, loss_inputs(rows, totals_of(rows)))
    given = loss_inputs(rows, totals_of(rows), token_advantages=True)
    with pytest.raises(ValueError, match="is one a token, but ratio_level=sequence takes one a sequence"):
        policy_loss(preset("gspo").replace(advantage="teacher"), given)


def test_gspo_token_takes_them_too() -> None:
    answers = taught(random_answers(3, 5e-4), 3)
    value, grads = reference.gradients(reference.gspo_token, answers)
    got, got_grads, _ = engine(preset("gspo_token").replace(advantage="teacher"), as_rows(answers, 3))
    assert got == pytest.approx(value, abs=1e-12)
    assert_same(got_grads, grads, 1e-12)


def test_equal_rewards_are_no_warning() -> None:
    equal: dict[str, float] = {"zero_variance_groups": 1.0, "groups": 4.0, "reward_mean": 0.0}
    assert runtime_warnings(SPEC, equal) == []
    assert [found.code for found in runtime_warnings(preset("grpo"), equal)] == ["constant-reward"]


def test_objectives_without_a_teacher_lack_the_metric() -> None:
    answers: list[reference.Response] = taught(random_answers(3, 0.1), 3)
    sums: dict[str, Tensor] = as_sums(engine(preset("grpo"), as_rows(answers))[2])
    assert "teacher_kl" not in finalize_step([sums])
