"""Logged metrics and the warnings of a running job."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.objective import (
    BatchTotals,
    LossInputs,
    finalize_metrics,
    finalize_step,
    group_metrics,
    loss,
    metrics,
    policy_loss,
    runtime_warnings,
    summary,
)
from gspo_megatron.objective.summary import quantile
from tests.unit.objective.cases import PRESET_NAMES, as_answers, as_rows, as_sums, engine, preset, random_answers

README = Path(summary.__file__).with_name("README.md").read_text()


def sums_of(answers: Any, name: str = "gspo") -> dict[str, Any]:
    return as_sums(engine(preset(name), as_rows(answers, seed=1))[2])


def codes(*minibatches: dict[str, Any], name: str = "gspo", **axes: Any) -> list[str]:
    return [f.code for f in runtime_warnings(preset(name).replace(**axes), finalize_step(minibatches))]


def on_policy(seed: int) -> list[Any]:
    answers = random_answers(seed)
    for answer in answers:
        answer.logp, answer.sampler = answer.old.clone(), answer.old.clone()
    return answers


def shifted(by: float, advantage: float, sampler_gap: float = 0.0) -> list[Any]:
    answers = as_answers([[by] * 8] * 4, [advantage] * 4)
    for answer in answers:
        answer.sampler = answer.old + sampler_gap
    return answers


@pytest.mark.parametrize(
    ("length", "bucket"),
    [(1, "le_64"), (64, "le_64"), (65, "le_256"), (256, "le_256"), (257, "le_1024"), (1024, "le_1024"),
     (4096, "le_4096"), (4097, "le_16384"), (16384, "le_16384"), (65536, "le_65536"), (65537, "gt_65536"),
     (100_000, "gt_65536")],
)  # fmt: skip
def test_length_buckets(length: int, bucket: str) -> None:
    current = torch.full((length,), -1.0, dtype=torch.float64)
    inputs = LossInputs(
        current, current - 1e-4, torch.ones(1), torch.ones(length, dtype=torch.bool), torch.tensor([0, length]),
        BatchTotals(1, length),
    )  # fmt: skip
    out = policy_loss(preset("gspo"), inputs)
    logged = finalize_metrics(out.metrics)
    assert logged[f"sequences/{bucket}"] == 1
    assert logged[f"log_s_p50/{bucket}"] == pytest.approx(1e-4, rel=0.13)
    assert logged["log_s_noise"] == pytest.approx(1e-4 * math.sqrt(length))


def test_quantiles_of_log_s() -> None:
    values = [-3e-3] * 2 + [-2e-5] * 48 + [0.0] * 10 + [4e-6] * 38 + [0.5] * 2
    logged = finalize_metrics(sums_of(as_answers([[v] for v in values], [1.0] * 100)))
    assert logged["log_s_p01"] == pytest.approx(-3e-3, rel=0.13)
    assert logged["log_s_p50"] == pytest.approx(-2e-5, rel=0.13)
    assert logged["log_s_p99"] == pytest.approx(0.5, rel=0.13)
    assert logged["log_s_abs_max"] == pytest.approx(0.5)
    assert quantile([0.0] * metrics.SIDE_BINS + [4.0] + [0.0] * metrics.SIDE_BINS, 0.5) == 0.0


def test_log_s_beyond_the_histogram_lands_in_its_outermost_bins() -> None:
    logged = finalize_metrics(sums_of(as_answers([[-40.0], [1e-12], [40.0]], [1.0] * 3)))
    assert (logged["log_s_p01"], logged["log_s_p50"], logged["log_s_p99"]) == (
        pytest.approx(-10, rel=0.2), 0.0, pytest.approx(10, rel=0.2),
    )  # fmt: skip


def test_a_step_is_the_sum_of_its_minibatches() -> None:
    parts = [sums_of(random_answers(seed, 4e-4)) for seed in range(4)]
    step, each = finalize_step(parts), [finalize_metrics(part) for part in parts]
    weights = [one["trained_tokens"] for one in each]
    for name in ("clip_fraction_tokens", "policy_k1", "mismatch_k3", "entropy"):
        mean = sum(w * one[name] for w, one in zip(weights, each, strict=True)) / sum(weights)
        assert step[name] == pytest.approx(mean), name
    for name in ("log_s_abs_max", "mismatch_ratio_max", "mismatch_abs_max"):
        assert step[name] == max(one[name] for one in each)
    assert step["loss"] == pytest.approx(sum(one["loss"] for one in each) / 4)
    assert [step[f"clip_left_sequences/minibatch_{i}"] for i in range(4)] == [
        one["clip_left_sequences"] for one in each
    ]


def test_zero_coefficients_count_clips_and_zero_advantages_once() -> None:
    answers = [*shifted(1e-2, 1.0)[:2], *shifted(0.0, 0.0)[:1], *shifted(0.0, 1.0)[:1]]
    logged = finalize_metrics(sums_of(answers))
    assert logged["clip_right_sequences"] == pytest.approx(0.5)
    assert logged["zero_advantage_sequences"] == pytest.approx(0.25)
    assert logged["zero_coefficient_sequences"] == pytest.approx(0.75)
    assert logged["zero_coefficient_tokens"] == pytest.approx(0.75)


def test_nothing_trained_gives_finite_metrics() -> None:
    nothing = LossInputs(
        torch.empty(0), torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.bool), torch.tensor([0]),
        BatchTotals(0, 0), torch.empty(0),
    )  # fmt: skip
    sums = policy_loss(preset("gspo"), nothing).metrics
    logged = finalize_step([sums])
    assert all(math.isfinite(value) for value in logged.values())
    assert runtime_warnings(preset("gspo"), logged) == []


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_logged_name_is_documented(name: str) -> None:
    spec = preset(name).replace(correction="tis", kl="k3", kl_coefficient=0.1)
    logged = finalize_step([as_sums(engine(spec, as_rows(random_answers(0)))[2])] * 2)
    logged |= group_metrics(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    missing = {key.split("/")[0] for key in logged if f"`{key.split('/')[0]}`" not in README}
    assert not missing


def test_a_healthy_step_says_nothing() -> None:
    assert codes(sums_of(on_policy(0)), sums_of(shifted(1e-4, 1.0)), sums_of(shifted(-1e-4, -1.0))) == []


def test_mostly_clipped() -> None:
    assert codes(sums_of(on_policy(0)), sums_of(shifted(-1e-2, -1.0))) == ["mostly-clipped"]
    finding = runtime_warnings(preset("gspo"), finalize_step([sums_of(on_policy(0)), sums_of(shifted(-1e-2, -1.0))]))[0]
    assert "100% of the sequences are clipped (clip_fraction_sequences/minibatch_1), 100% on the left" in str(finding)


def test_first_minibatch_moved_by_one_stale_weight() -> None:
    assert codes(sums_of(shifted(2e-6, 1.0)), sums_of(on_policy(0))) == ["first-minibatch-moved"]
    assert codes(sums_of(shifted(9e-7, 1.0)), sums_of(on_policy(0))) == []


def test_mismatch_wider_than_band() -> None:
    first = sums_of(shifted(0.0, 1.0, sampler_gap=1.5e-3))
    finding = runtime_warnings(preset("gspo"), finalize_step([first]))[0]
    assert (finding.code, finding.severity) == ("mismatch-wider-than-band", "info")
    assert "1.5e-03 nats a token" in finding.message and "3.0e-04" in finding.message
    spec = preset("gspo").replace(ratio_reference="sampler")
    bypass = as_sums(engine(spec, as_rows(shifted(0.0, 1.0, sampler_gap=1.5e-3)))[2])
    found = runtime_warnings(spec, finalize_step([bypass]))
    assert [(f.code, f.severity) for f in found] == [("mismatch-wider-than-band", "warning")]
    assert codes(first, name="grpo") == []


def test_constant_reward() -> None:
    logged = finalize_step([sums_of(on_policy(0))]) | group_metrics(torch.zeros(4), torch.tensor([0, 0, 1, 1]))
    assert [f.code for f in runtime_warnings(preset("gspo"), logged)] == ["constant-reward"]
    logged |= group_metrics(torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0, 1, 1]))
    assert runtime_warnings(preset("gspo"), logged) == []


def test_nan_where_nobody_may_look_is_counted_and_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU values are not checked: no index may be made of a NaN."""
    monkeypatch.setattr(loss, "check_values", lambda inputs: None)
    current = torch.tensor([-1.0, float("nan"), -1.0, float("inf")], requires_grad=True)
    old, mask = torch.full((4,), -1.0), torch.ones(4, dtype=torch.bool)
    inputs = LossInputs(current, old, torch.ones(3), mask, torch.tensor([0, 2, 3, 4]), BatchTotals(3, 4), old)
    out = policy_loss(preset("gspo"), inputs)
    assert not torch.isfinite(out.loss)
    assert float(out.metrics["nonfinite_tokens"]) == 2
    assert float(out.metrics["log_s_histogram"].sum()) == 3


def test_nonfinite_logprobs_are_counted_where_nobody_may_look() -> None:
    """On a GPU the values are not read, so the count in the metrics has to tell."""
    sums = sums_of(on_policy(0)) | {"nonfinite_tokens": torch.tensor(2.0).double()}
    assert codes(sums) == ["nonfinite-logprobs"]


def test_the_example_of_the_readme_runs() -> None:
    exec(README.split("```python")[1].split("```")[0], {})


@pytest.mark.parametrize(
    ("overlong", "consequence", "fix"),
    [
        ("filter", "not trained on", "objective.overlong=soft"),
        ("zero", "scored as wrong", "objective.overlong=soft"),
        ("soft", "charged the whole penalty", "raise rollout.max_answer_tokens"),
    ],
)
def test_mostly_truncated_names_what_the_recipe_does_with_them(overlong: str, consequence: str, fix: str) -> None:
    spec = preset("gspo").replace(overlong=overlong, overlong_buffer=4 if overlong == "soft" else None)
    logged = finalize_step([sums_of(on_policy(0))])
    (finding,) = runtime_warnings(spec, logged | {"truncated": 0.75})
    assert (finding.code, finding.severity, finding.key) == ("mostly-truncated", "warning", "objective.overlong")
    said = f"75% of the responses are cut at their limit; with overlong={overlong} they are {consequence}"
    assert said in str(finding)
    assert fix in finding.fix and "rollout.max_answer_tokens" in finding.fix
    assert runtime_warnings(spec, logged | {"truncated": 0.5}) == []
    assert runtime_warnings(preset("gspo"), logged | {"truncated": 1.0}) == []  # no rule, no consequence
