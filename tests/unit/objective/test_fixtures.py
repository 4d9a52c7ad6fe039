"""Every entry of tests/data/objective_vectors.json, on the engine: hand-checked values and gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.objective import (
    finalize_metrics,
    generalized_advantages,
    group_advantages,
    soft_overlong_penalty,
)
from tests import reference
from tests.unit.objective.cases import FIXTURES, as_answers, as_rows, as_sums, check_grads, engine, near, preset, run

B = FIXTURES["B"]
TESTED_ENTRIES = {
    "A", "A2", "B", "Bside", "C", "H", "GAE", "overlong", "token_table", "GMPO_A1", "GMPO_A-1", "agg", "mismatch",
    "partial", "router", "vespo", "rfpp_baseline", "temperature", "logits_fixture", "opsm", "luspo_B", "sapo_B",
    "cispo_B_cap1.3_logpold-1_tokenmean", "dapo_B", "drgrpo_B_L5", "PPO",
}  # fmt: skip


def test_every_entry_has_its_test() -> None:
    assert set(FIXTURES) == TESTED_ENTRIES


GROUP_OPTIONS: dict[str, dict[str, Any]] = {
    "ddof0": {},
    "ddof1": {"ddof": 1},
    "mean_only": {"normalize": "mean"},
    "rloo": {"normalize": "rloo"},
    "verl_ddof1_eps1e-6": {"ddof": 1, "eps": 1e-6},
    "trl_ddof1_eps1e-4": {"ddof": 1, "eps": 1e-4},
}


@pytest.mark.parametrize("entry", ["A", "A2"])
def test_group_advantages(entry: str) -> None:
    rewards = torch.tensor(FIXTURES[entry]["rewards"], dtype=torch.float64)
    for column in set(FIXTURES[entry]) - {"rewards"}:
        got = group_advantages(rewards, torch.zeros(4, dtype=torch.int64), **GROUP_OPTIONS[column])
        # The columns with an eps are printed with six to eight decimals.
        assert got.tolist() == pytest.approx(FIXTURES[entry][column], abs=1e-8 if "eps" in column else 5e-10), column


@pytest.mark.parametrize(("column", "ddof"), [("adv_ddof0", 0), ("adv_ddof1", 1)])
def test_whitened_group_baseline(column: str, ddof: int) -> None:
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0], dtype=torch.float64)
    groups = torch.tensor([4, 4, 4, 4, 9, 9, 9, 9])
    entry = FIXTURES["rfpp_baseline"]
    assert group_advantages(rewards, groups, "mean").tolist() == pytest.approx(entry["centered"], abs=1e-10)
    assert group_advantages(rewards, groups, "batch_std", ddof).tolist() == pytest.approx(entry[column], abs=1e-9)


def test_gspo_main_fixture() -> None:
    value, grads, sums = run(preset("gspo"), B["log_ratio"], B["A"])
    assert value == near(B["objective"])
    check_grads(grads, B["dJ_dlogp"])
    logged = finalize_metrics(as_sums(sums))
    assert logged["clip_fraction_sequences"] == near(B["gspo_clip_frac_seq"])
    assert logged["clip_fraction_tokens"] == near(B["gspo_clip_frac_token_weighted"])
    assert (sums["clip_low_sequences"], sums["clip_high_sequences"]) == pytest.approx((1, 1))
    assert (sums["clip_low_tokens"], sums["clip_high_tokens"]) == (5, 3)
    assert sums["tokens"] == B["tokens"]


def test_gspo_one_sequence_at_a_time() -> None:
    """Each ratio and each value by itself; the unnormalised ratio is another number."""
    for row, advantage, s, value, product in zip(
        B["log_ratio"], B["A"], B["s"], B["seq_value"], B["unnormalised_ratio"], strict=True
    ):
        assert run(preset("gspo"), [row], [advantage])[0] == near(value)
        assert run(preset("gspo").replace(trust="none"), [row], [1.0])[0] == near(s)
        assert math.exp(sum(row)) == near(product)


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_gspo_main_fixture_in_float32(name: str) -> None:
    """s to 2e-7 absolute, the same clip decisions."""
    for row, s in zip(B["log_ratio"], B["s"], strict=True):
        rows = as_rows(as_answers([row], [1.0]), dtype=torch.float32)
        assert engine(preset(name).replace(trust="none"), rows)[0] == pytest.approx(s, abs=2e-7)
    sums = engine(preset(name), as_rows(as_answers(B["log_ratio"], B["A"]), dtype=torch.float32))[2]
    assert (sums["clip_low_tokens"], sums["clip_high_tokens"]) == (5, 3)


def test_bfloat16_logprobs_would_flip_two_decisions() -> None:
    """The guard of the precision rule: rounded to bf16 the same log-probs clip y3 and let y2 pass."""
    rounded = [[(-1.3 + d) for d in row] for row in B["log_ratio"]]
    rounded = [(torch.tensor(r).bfloat16().double() - torch.tensor(-1.3).bfloat16().double()).tolist() for r in rounded]
    sums = run(preset("gspo"), rounded, B["A"])[2]
    assert (sums["clip_low_tokens"], sums["clip_high_tokens"]) == (9, 0)


def test_grpo_on_the_main_fixture() -> None:
    entry = B["grpo_0.2_0.27"]
    value, grads, sums = run(preset("grpo"), B["log_ratio"], B["A"])
    assert value == near(entry["objective"])
    check_grads(grads, entry["dJ_dlogp"])
    assert sums["clip_low_tokens"] + sums["clip_high_tokens"] == B["grpo_clip_tokens"]
    for row, advantage, expected in zip(B["log_ratio"], B["A"], entry["seq_value"], strict=True):
        assert run(preset("grpo"), [row], [advantage])[0] == near(expected)
    for row, ratios in zip(B["log_ratio"], entry["w"], strict=True):
        for d, w in zip(row, ratios, strict=False):
            assert run(preset("grpo").replace(trust="none"), [[d]], [1.0])[0] == near(w)


def test_both_sides_of_the_band_with_both_signs() -> None:
    entry = FIXTURES["Bside"]
    rows = [[d] * 3 for d in entry["log_ratio_each"]]
    value, grads, sums = run(preset("gspo"), rows, [float(a) for a in entry["A"]])
    assert value == near(entry["objective"])
    check_grads(grads, [[g] * 3 for g in entry["grad_first_token"]])
    assert (sums["clip_low_tokens"], sums["clip_high_tokens"]) == (3, 3)
    for row, advantage, expected in zip(rows, entry["A"], entry["seq_value"], strict=True):
        assert run(preset("gspo"), [row], [float(advantage)])[0] == near(expected)
    for row, s in zip(rows, entry["s"], strict=True):
        assert run(preset("gspo").replace(trust="none"), [row], [1.0])[0] == near(s)


def test_token_advantages_of_mixed_sign() -> None:
    entry = FIXTURES["C"]
    value, grads, _ = run(preset("gspo_token"), entry["log_ratio"], entry["A_tok"], token_advantages=True)
    assert value == near(entry["value"])
    check_grads(grads, entry["grad"])
    s, _, _ = run(preset("gspo_token").replace(trust="none"), entry["log_ratio"], [1.0])
    assert s == near(entry["s"])
    answers = as_answers(entry["log_ratio"], entry["A_tok"])
    _, direct = reference.gradients(reference.sequence_direct_with_token_advantages, answers)
    assert abs(float(direct[0][0])) > 0.1  # the form through the mean moves token 1, GSPO-token does not


def test_kl_estimators_and_the_identity_with_log_s() -> None:
    entry = FIXTURES["H"]
    d = entry["d=logp_theta-logp_old"]
    s, _, sums = run(preset("gspo").replace(trust="none"), [d], [1.0])
    logged = finalize_metrics(as_sums(sums))
    assert logged["policy_k1"] == near(entry["k1_mean"])
    assert logged["policy_k3"] == near(entry["k3_mean"])
    assert logged["log_s_mean"] == pytest.approx(-logged["policy_k1"], abs=1e-15)
    assert s == near(entry["s"])
    assert math.exp(logged["log_s_mean"]) == near(entry["ppl_ratio_old_over_theta"])
    answers = as_answers([d], [0.0])
    answers[0].reference = answers[0].old
    spec = preset("grpo").replace(kl="k2", kl_coefficient=1.0)
    assert -engine(spec, as_rows(answers))[0] == near(entry["k2_mean"])


@pytest.mark.parametrize(("decay", "column"), [(0.95, "adv"), (0.0, "adv_lambda0"), (1.0, "adv_lambda1")])
def test_generalized_advantages_step_over_untrained_tokens(decay: float, column: str) -> None:
    entry = FIXTURES["GAE"]
    mask = torch.tensor([False, True, False, True, True, False])
    rewards, values = torch.full((6,), 99.0, dtype=torch.float64), torch.full((6,), 99.0, dtype=torch.float64)
    rewards[mask], values[mask] = torch.tensor(entry["r"]).double(), torch.tensor(entry["V"], dtype=torch.float64)
    # Two copies in one pack: nothing may leak from one sequence into the next.
    twice = torch.tensor([0, 6, 12])
    got = generalized_advantages(rewards.repeat(2), values.repeat(2), mask.repeat(2), twice, entry["gamma"], decay)
    for copy in (got[:6], got[6:]):
        assert copy[mask].tolist() == pytest.approx(entry[column], abs=1e-10)
        assert copy[~mask].tolist() == [0, 0, 0]
        if decay == entry["lambda"]:
            assert (copy + values)[mask].tolist() == pytest.approx(entry["returns"], abs=1e-10)


def test_soft_overlong_penalty() -> None:
    lengths = torch.tensor([int(n) for n in FIXTURES["overlong"]])
    penalties = soft_overlong_penalty(lengths, torch.full_like(lengths, 20_480), 4_096)
    assert penalties.tolist() == list(FIXTURES["overlong"].values())


@pytest.mark.parametrize("row", FIXTURES["token_table"], ids=lambda row: f"{row['r']}{'+' if row['A'] > 0 else '-'}")
def test_single_token_table(row: dict[str, Any]) -> None:
    grpo = preset("grpo")
    specs = {
        "ppo_.2_.2": grpo.replace(clip_high=0.2),
        "dapo_.2_.28": preset("dapo"),
        "dual_c3": grpo.replace(clip_high=0.2, trust="dual_clip"),
        "cispo_max5": preset("cispo"),
        "sapo": preset("sapo"),
    }
    assert set(specs) == set(row) - {"r", "A"}
    for column, spec in specs.items():
        value, grads, _ = run(spec, [[math.log(row["r"])]], [row["A"]], old=0.0)
        assert (value, float(grads[0])) == (near(row[column][0]), near(row[column][1])), column


@pytest.mark.parametrize(("entry", "advantage"), [("GMPO_A1", 1.0), ("GMPO_A-1", -1.0)])
def test_gmpo(entry: str, advantage: float) -> None:
    fixture = FIXTURES[entry]
    spec = preset("gmpo")
    assert spec.clip_low == spec.clip_high == fixture["clip"]
    value, grads, sums = run(spec, [fixture["log_ratio"]], [advantage])
    assert value == near(fixture["value"])
    check_grads(grads, [fixture["grad"]])
    assert sums["clip_low_tokens"] + sums["clip_high_tokens"] == 1


def test_aggregations() -> None:
    """Token losses 1 and 3 over 2 and 6 tokens: with ratio 1 the loss of a token is minus its advantage."""
    entry = FIXTURES["agg"]
    rows, advantages = [[0.0] * n for n in entry["lens"]], [-loss for loss in entry["token_loss"]]
    for aggregation, expected in (
        ("seq_mean_token_mean", entry["seq_mean_token_mean"]),
        ("token_mean", entry["token_mean"]),
        ("seq_mean_token_sum", entry["seq_mean_token_sum"]),
        ("constant", entry["dr_grpo_const_L=8"]),
    ):
        spec = preset("grpo").replace(aggregation=aggregation, aggregation_length=8)
        assert -run(spec, rows, advantages)[0] == pytest.approx(expected, abs=1e-12)
    for length, factor in zip(entry["lens"], entry["luspo_factor"], strict=True):
        assert run(preset("luspo"), [[0.0] * length], [1.0])[0] == pytest.approx(factor, abs=1e-12)


def test_partial_rollout_of_two_weight_versions() -> None:
    entry = FIXTURES["partial"]
    old, new = (torch.tensor(entry[key], dtype=torch.float64) for key in ("old", "new"))
    answer = reference.Response(new, old, torch.ones(5, dtype=torch.float64), old)
    value, _, sums = engine(preset("gspo").replace(trust="none"), as_rows([answer]))
    assert (value, sums["log_s"]) == (near(entry["s"]), near(entry["log_s"]))


def test_published_objectives_on_the_main_fixture() -> None:
    gspo_band = {"clip_low": B["eps"][0], "clip_high": B["eps"][1]}
    luspo = preset("luspo").replace(**gspo_band)
    assert run(luspo, B["log_ratio"], B["A"])[0] == near(FIXTURES["luspo_B"]["objective"])
    for row, advantage, expected in zip(B["log_ratio"], B["A"], FIXTURES["luspo_B"]["value_i"], strict=True):
        assert run(luspo, [row], [advantage])[0] == near(expected)
    for row, advantage, expected in zip(B["log_ratio"], B["A"], FIXTURES["sapo_B"]["seq_value"], strict=True):
        assert run(preset("sapo"), [row], [advantage])[0] == near(expected)
    halves = [a / 2 for a in B["A"]]
    for entry, spec, advantages, old in (
        ("sapo_B", preset("sapo"), B["A"], -1.3),
        ("dapo_B", preset("dapo"), B["A"], -1.3),
        ("drgrpo_B_L5", preset("dr_grpo").replace(aggregation_length=5), halves, -1.3),
        ("cispo_B_cap1.3_logpold-1_tokenmean", preset("cispo").replace(ratio_cap=1.3), B["A"], -1.0),
    ):
        value, grads, _ = run(spec, B["log_ratio"], advantages, old)
        assert value == near(FIXTURES[entry]["objective"]), entry
        check_grads(grads, FIXTURES[entry]["grad"])


def test_from_logits() -> None:
    """Two tokens of a vocabulary of two: the gradient at the logits, through log_softmax."""
    entry = FIXTURES["logits_fixture"]
    logits = torch.tensor(entry["z_new"], dtype=torch.float64, requires_grad=True)
    pick = torch.tensor(entry["actions"])[:, None]
    current = torch.log_softmax(logits, -1).gather(-1, pick).squeeze(-1)
    old = torch.log_softmax(torch.tensor(entry["z_old"], dtype=torch.float64), -1).gather(-1, pick).squeeze(-1)
    assert current.tolist() == pytest.approx(entry["logp_new"], abs=1e-11)
    assert old.tolist() == pytest.approx(entry["logp_old"], abs=1e-11)
    answer = reference.Response(current.detach(), old, torch.tensor([1.0, 1.0], dtype=torch.float64), old)
    value, grads, _ = engine(preset("gspo"), as_rows([answer]))
    assert value == near(entry["value"]) == near(entry["s"])
    current.backward(grads[0])
    assert logits.grad is not None
    for got, expected in zip(logits.grad.tolist(), entry["dJ_dz"], strict=True):
        assert got == pytest.approx(expected, abs=1e-10)


VESPO = """
from gspo_megatron.objective import Surrogate

def vespo(terms):
    w = terms.ratio.detach()
    positive = terms.advantages > 0
    phi = (w**2 * (3 * (1 - w)).exp()).where(positive, w**3 * (2 * (1 - w)).exp())
    nothing = positive & ~positive
    return Surrogate(phi * terms.advantages * terms.logprobs, nothing, nothing)
"""


def test_vespo_as_a_rule_from_a_file(tmp_path: Path) -> None:
    """Its weight W^k exp(lambda (1 - W)) on a one-token sequence, in a file as a user would write it."""
    (tmp_path / "vespo.py").write_text(VESPO)
    spec = preset("grpo").replace(trust=f"{tmp_path / 'vespo.py'}:vespo")
    for key, phi in FIXTURES["vespo"].items():
        w, sign = float(key.split(",")[0][2:]), 1.0 if key.endswith("pos") else -1.0
        _, grads, _ = run(spec, [[math.log(w)]], [sign])
        assert float(grads[0]) == near(sign * phi)


def test_temperature_and_router_entries_hold_for_the_oracle() -> None:
    """The head and the router are policy/: their tests use these oracle functions."""
    entry = FIXTURES["temperature"]
    assert reference.sampled_logprob(entry["logits"], 0) == near(entry["T=1"])
    assert reference.sampled_logprob(entry["logits"], 0, 0.6) == near(entry["T=.6"])
    router = FIXTURES["router"]
    assert reference.expert_gates(router["logits"], range(4)) == pytest.approx(router["softmax"], abs=1e-9)
    assert reference.expert_gates(router["logits"], [0, 1]) == pytest.approx(router["topk_softmax_then_norm"], abs=1e-9)
    assert router["topk_then_softmax"] == router["topk_softmax_then_norm"]
    assert reference.expert_gates(router["logits"], [0, 1], False) == pytest.approx(router["no_norm"], abs=1e-9)
    assert reference.expert_gates(router["logits"], [0, 2]) == pytest.approx(router["r3_mask_{0,2}_gates"], abs=1e-8)
