"""What must not change the loss or the gradient: the invariances D-I, on every preset."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.objective import BatchTotals, LossInputs, policy_loss
from tests import reference
from tests.unit.objective.cases import (
    EXAMPLES,
    FIXTURES,
    PRESET_NAMES,
    WHOLE_ROWS,
    Layout,
    as_answers,
    as_rows,
    assert_same,
    engine,
    loss_inputs,
    preset,
    random_answers,
    totals_of,
    zigzag,
)

EVERY_CORRECTION = {
    "correction": ["tis", "geometric_mask", "opsm", "trust_region_mask", "veto"],
    "geometric_low": 0.7,
    "geometric_high": 1.4,
}


@pytest.mark.parametrize("garbage", [0.0, -1e30, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_untrained_positions_hold_anything(name: str, garbage: float) -> None:
    answers = random_answers(7, 3e-4)
    clean = engine(preset(name), as_rows(answers))
    dirty = engine(preset(name), as_rows(answers, seed=3, garbage=garbage))
    assert dirty[0] == pytest.approx(clean[0], abs=1e-13)
    assert_same(dirty[1], clean[1], 1e-13)
    assert dirty[2]["tokens"] == clean[2]["tokens"]
    assert dirty[2]["log_s"] == pytest.approx(clean[2]["log_s"], abs=1e-13)


def test_the_gradient_at_untrained_positions_is_zero() -> None:
    rows = as_rows(random_answers(7), seed=3, garbage=-1.0)
    inputs = loss_inputs(rows, totals_of(rows))
    leaf = torch.where(inputs.loss_mask, inputs.logprobs.detach(), float("nan")).requires_grad_()
    kept = {name: getattr(inputs, name) for name in LossInputs.__slots__}
    policy_loss(preset("gspo"), LossInputs(**{**kept, "logprobs": leaf})).loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[~inputs.loss_mask], torch.zeros(int((~inputs.loss_mask).sum()), dtype=torch.float64))


@pytest.mark.parametrize("name", PRESET_NAMES)
@settings(EXAMPLES, max_examples=15)
@given(data=st.data())
def test_no_layout_changes_loss_or_gradient(name: str, data: st.DataObject) -> None:
    """Any split into micro-batches of any rank, empty ones too, each cut zig-zag over 1, 2 or 4 context ranks."""
    answers = random_answers(data.draw(st.integers(0, 10**6)), 4e-4, count=5)
    order = data.draw(st.permutations(range(5)))
    cuts = sorted(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
    microbatches = [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, 5], strict=True)]
    context = data.draw(st.sampled_from([1] if name in WHOLE_ROWS else [1, 2, 4]))
    spec = preset(name)
    if not spec.correction:
        spec = spec.replace(**EVERY_CORRECTION)
    one = engine(spec, as_rows(answers))
    many = engine(spec, as_rows(answers, seed=data.draw(st.integers(0, 99))), Layout(microbatches, context))
    assert many[0] == pytest.approx(one[0], abs=1e-12)
    assert_same(many[1], one[1], 1e-12)
    for metric, value in one[2].items():
        if metric != "log_s_histogram":
            assert many[2][metric] == pytest.approx(value, abs=1e-9), metric
    flat = [[sum(row) for row in sums["log_s_histogram"]] for sums in (one[2], many[2])]
    assert flat[0] == pytest.approx(flat[1], abs=1e-9)


@pytest.mark.parametrize("context", [1, 2, 4])
def test_token_advantages_over_context_ranks(context: int) -> None:
    answers = random_answers(9, 4e-4, token_advantages=True)
    value, grads = reference.gradients(reference.gspo_token, answers)
    layout = Layout([[0, 1, 2], [3, 4, 5]], context, token_advantages=True)
    got = engine(preset("gspo_token"), as_rows(answers, seed=5), layout)
    assert got[0] == pytest.approx(value, abs=1e-12)
    assert_same(got[1], grads, 1e-12)


def test_the_zigzag_covers_every_position_once() -> None:
    for length in range(20):
        for context in (1, 2, 4):
            held = [at for rank in range(context) for at in zigzag(length, context, rank)]
            assert sorted(held) == list(range(length))


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 1, 2], [3]]])
@pytest.mark.parametrize("context", [1, 2, 4])
def test_main_fixture_in_every_split(split: list[list[int]], context: int) -> None:
    fixture = FIXTURES["B"]
    rows = as_rows(as_answers(fixture["log_ratio"], fixture["A"]), seed=1)
    value, grads, sums = engine(preset("gspo"), rows, Layout(split, context))
    assert value == pytest.approx(fixture["objective"], abs=1e-12)
    for grad, printed in zip(grads, fixture["dJ_dlogp"], strict=True):
        assert grad.tolist() == pytest.approx(printed[: grad.numel()], abs=1e-12)
    assert sums["clip_low_sequences"] == pytest.approx(1) and sums["clip_high_sequences"] == pytest.approx(1)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_fully_masked_sequences_do_not_count(name: str) -> None:
    answers = random_answers(4)
    empty = reference.Response(*(torch.empty(0, dtype=torch.float64) for _ in fields(reference.Response)))
    alone = engine(preset(name), as_rows(answers))
    mixed = engine(preset(name), as_rows([empty, *answers[:3], empty, *answers[3:], empty], seed=2))
    assert mixed[0] == pytest.approx(alone[0], abs=1e-13)
    assert_same([g for g in mixed[1] if g.numel()], alone[1], 1e-13)
    assert mixed[2]["sequences"] == pytest.approx(len(answers))


def test_sequences_of_one_token() -> None:
    answers = random_answers(4, 3e-4, longest=1)
    value, grads = reference.gradients(reference.gspo, answers)
    got, got_grads, _ = engine(preset("gspo"), as_rows(answers, seed=8), Layout([[0, 1, 2, 3, 4, 5]], 4))
    assert got == pytest.approx(value, abs=1e-13)
    assert_same(got_grads, grads, 1e-13)


def empty_inputs(num_sequences: int, per_token: bool = False) -> LossInputs:
    nothing = torch.empty(0)
    return LossInputs(
        torch.empty(0, requires_grad=True), nothing, nothing if per_token else torch.zeros(num_sequences),
        torch.empty(0, dtype=torch.bool), torch.zeros(num_sequences + 1, dtype=torch.int32), BatchTotals(4, 9),
        nothing, values=nothing, old_values=nothing, returns=nothing, token_advantages=per_token,
    )  # fmt: skip


@pytest.mark.parametrize("num_sequences", [0, 3])
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_a_rank_with_nothing_has_a_loss_of_zero_with_a_graph(name: str, num_sequences: int) -> None:
    inputs = empty_inputs(num_sequences, preset(name).has_token_advantages)
    out = policy_loss(preset(name), inputs)
    assert out.loss.item() == 0 and out.loss.requires_grad
    out.loss.backward()
    assert inputs.logprobs.grad is not None
    assert all(bool((value == 0).all()) for value in out.metrics.values())


def test_a_rank_with_only_untrained_tokens() -> None:
    current = torch.full((4,), float("nan"), requires_grad=True)
    nothing = torch.zeros(4, dtype=torch.bool)
    out = policy_loss(
        preset("gspo"),
        LossInputs(current, current.detach(), torch.ones(2), nothing, torch.tensor([0, 3, 4]), BatchTotals(0, 0)),
    )
    out.loss.backward()
    assert out.loss.item() == 0 and current.grad is not None and torch.equal(current.grad, torch.zeros(4))


def test_leaving_out_the_stop_token_changes_the_ratio() -> None:
    """Fixture B's second answer without its last token has a mean of m2 + 0.15."""
    row = FIXTURES["B"]["log_ratio"][1]
    _, _, whole = engine(preset("gspo"), as_rows(as_answers([row], [1.0])))
    _, _, cut = engine(preset("gspo"), as_rows(as_answers([row[:-1]], [1.0])))
    assert cut["log_s"] - whole["log_s"] == pytest.approx(0.15, abs=1e-12)


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "grpo", "sapo", "gmpo"])
def test_length_does_not_weigh_in_a_sequence_mean(name: str) -> None:
    """Doubling a sequence with the same per-token values leaves loss and sequence gradient; LUSPO doubles it."""
    row = [2e-4, -1e-4]
    base = as_answers([row, [0.0]], [1.0, -1.0])
    double = as_answers([row + row, [0.0]], [1.0, -1.0])
    one, two = engine(preset(name), as_rows(base)), engine(preset(name), as_rows(double))
    assert one[0] == pytest.approx(two[0], abs=1e-14)
    assert float(one[1][0].sum()) == pytest.approx(float(two[1][0].sum()), abs=1e-14)
    luspo = [engine(preset("luspo"), as_rows(answers))[1][0].sum() for answers in (base, double)]
    assert float(luspo[1] / luspo[0]) == pytest.approx(2, abs=1e-12)


@pytest.mark.parametrize(
    "name", ["tis", "mis", "icepop", "geometric_mask", "sequence_product", "opsm", "trust_region_mask", "veto"]
)
def test_a_correction_is_a_factor_and_nothing_else(name: str) -> None:
    """|y_i| and the denominators stay: the corrected gradient is factor x gradient, token by token."""
    bounds = {
        "tis": {"cap": 2.0}, "mis": {"low": 0.0, "high": 2.0}, "icepop": {"low": 0.5, "high": 5.0},
        "geometric_mask": {"low": 0.8, "high": 1.2}, "sequence_product": {"cap": 2.0}, "opsm": {"delta": 1e-4},
        "trust_region_mask": {"region": 0.3}, "veto": {"below": 0.5},
    }[name]  # fmt: skip
    answers = random_answers(12, 3e-4, count=12, longest=8)
    changed = {"geometric_low": 0.8, "geometric_high": 1.2, "trust_region_delta": 0.3, "veto_below": 0.5}
    spec = preset("gspo").replace(correction=name, **changed)
    plain, corrected = engine(preset("gspo"), as_rows(answers)), engine(spec, as_rows(answers, seed=6))
    factors = [reference.correction(name, answer, **bounds) for answer in answers]
    expected = [g * torch.tensor(f, dtype=torch.float64) for g, f in zip(plain[1], factors, strict=True)]
    assert_same(corrected[1], expected, 1e-13)
    flat = [f for row in factors for f in row]
    assert len(set(flat)) > 1, "the case meets both sides of the bound"
    assert corrected[2]["correction_weight"] == pytest.approx(sum(flat), abs=1e-9)
    assert corrected[2]["correction_zero_tokens"] == sum(f == 0 for f in flat)
    for metric in ("tokens", "sequences", "log_s", "clip_low_sequences"):
        assert corrected[2][metric] == pytest.approx(plain[2][metric], abs=1e-12)


def test_ratio_against_the_sampler() -> None:
    answers = random_answers(21, 3e-4)
    spec = preset("gspo").replace(ratio_reference="sampler")
    behaviour = [reference.Response(a.logp, a.sampler, a.advantage) for a in answers if a.sampler is not None]
    value, grads = reference.gradients(reference.gspo, behaviour)
    got = engine(spec, as_rows(answers, seed=6), Layout([[0, 1, 2], [3, 4, 5]], 2))
    assert got[0] == pytest.approx(value, abs=1e-12)
    assert_same(got[1], grads, 1e-12)


@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("name", ["gspo", "grpo", "grpo_tis"])
@settings(EXAMPLES, max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_the_old_policy_on_the_line_between_sampler_and_current(name: str, context: int, seed: int) -> None:
    """A-3PO: value and gradient are those of the same objective with the interpolated log-probs as constants."""
    answers = random_answers(seed, 4e-4)
    ages = [[(seed + 3 * i + t // 2) % 4 for t in range(a.length)] for i, a in enumerate(answers)]
    spec = preset(name.split("_")[0])
    moved = reference.interpolated(answers, ages)
    weights = [[1.0] * a.length for a in answers]
    if name == "grpo_tis":  # the weight of decoupled PPO: interpolated policy over sampler, capped
        spec = spec.replace(correction="tis")
        weights = [reference.correction("tis", answer, cap=2.0) for answer in moved]
    _, grads = reference.gradients(reference.OBJECTIVES[name.split("_")[0]], moved)
    rows = as_rows(answers, seed=5)
    for row, age in zip(rows, ages, strict=True):
        row.staleness = torch.tensor(age, dtype=torch.float64)
    _, got, _ = engine(spec.replace(ratio_reference="interpolated"), rows, Layout([[0, 1, 2], [3, 4, 5]], context))
    assert_same(got, [g * torch.tensor(w, dtype=torch.float64) for g, w in zip(grads, weights, strict=True)], 1e-12)


def test_fresh_tokens_are_interpolated_to_the_sampler_itself() -> None:
    answers = random_answers(21, 3e-4)
    fresh, sampler = as_rows(answers), as_rows(answers)
    for row in fresh:
        row.staleness = torch.zeros(row.answer.length, dtype=torch.float64)
    got = engine(preset("gspo").replace(ratio_reference="interpolated"), fresh)
    wanted = engine(preset("gspo").replace(ratio_reference="sampler"), sampler)
    assert got[0] == wanted[0]
    assert_same(got[1], wanted[1], 0)


def test_one_token_beyond_the_region_takes_its_response_out() -> None:
    answers = as_answers([[0.0, 0.9, 0.0], [0.0, -1.1, 0.0]], [1.0, 1.0])
    spec = preset("gspo").replace(correction="trust_region_mask", trust="none")  # 0.405 and 0.605 nats
    _, grads, sums = engine(spec, as_rows(answers, seed=2), Layout([[0, 1]], 2))
    assert bool((grads[0] != 0).all()) and grads[1].tolist() == [0, 0, 0]
    assert sums["correction_zero_tokens"] == 3 and sums["sequences"] == pytest.approx(2)


def test_the_least_ratio_of_the_prefix_is_a_factor() -> None:
    """By hand: ratios 2, 1/2, 4, 8 have prefix factors 1, 2, 1/2, 1/2, so weights 2, 1, 2, 4; the next response starts
    with factor 1 again, and an untrained token in between changes nothing."""
    two = math.log(2)
    answers = as_answers([[two, -two, 2 * two, 3 * two], [-two, two]], [1.0, -1.0])
    for seed in (None, 4):
        _, grads, _ = engine(preset("minpro"), as_rows(answers, seed=seed))
        assert (grads[0] * 6).tolist() == pytest.approx([2, 1, 2, 4], abs=1e-14)
        assert (grads[1] * 6).tolist() == pytest.approx([-1 / 2, -1], abs=1e-14)
