"""From reduced metric sums to the numbers that are logged.

`finalize_metrics` serves one mini-batch, `finalize_step` a whole rollout batch; README.md lists every name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch import Tensor

from gspo_megatron.objective.bounded import LARGEST
from gspo_megatron.objective.metrics import (
    BINS_PER_DECADE,
    BUCKET_NAMES,
    COMPARED,
    SIDE_BINS,
    SMALLEST_EXPONENT,
    TEACHER_KL,
    Sums,
    add_sums,
)
from gspo_megatron.objective.value import VALUE_LOSS, value_metrics
from gspo_megatron.types import are_equal

PER_MINIBATCH = ("clip_fraction_sequences", "clip_left_sequences", "clip_right_sequences", "clip_fraction_tokens",
                 "clip_left_tokens", "clip_right_tokens", "log_s_abs_max", "log_s_p50")  # fmt: skip
LEFT_OUT = "left_out_"
"""Begins the names of the sums that count what is in no pass because its gradient is 0: `tokens`, `sequences`."""
_QUANTILES = {"p01": 0.01, "p10": 0.10, "p50": 0.50, "p90": 0.90, "p99": 0.99}


def finalize_metrics(sums: Sums) -> dict[str, float]:
    """Logged metrics of what the sums were taken over, and of the sequences that were left out of the passes."""
    value = {name: float(entry) for name, entry in sums.items() if entry.dim() == 0}
    left_out = {unit: value.get(f"{LEFT_OUT}{unit}", 0.0) for unit in ("tokens", "sequences")}
    every = {unit: max(value[unit] + count, 1.0) for unit, count in left_out.items()}
    logged = {
        "loss": value["loss"],
        "trained_tokens": value["tokens"] + left_out["tokens"],
        "trained_sequences": value["sequences"] + left_out["sequences"],
        "scored_sequences": value["sequences"] / every["sequences"],
        "compared_sequences": value[f"{COMPARED}sequences"] / every["sequences"],
        "nonfinite_tokens": value["nonfinite_tokens"],
        "zero_coefficient_tokens": (value["zero_tokens"] + left_out["tokens"]) / every["tokens"],
        "zero_coefficient_sequences": (value["zero_sequences"] + left_out["sequences"]) / every["sequences"],
        "zero_advantage_sequences": (value["zero_advantage_sequences"] + left_out["sequences"]) / every["sequences"],
    }
    for unit, count in every.items():
        logged[f"clip_left_{unit}"] = value[f"clip_low_{unit}"] / count
        logged[f"clip_right_{unit}"] = value[f"clip_high_{unit}"] / count
        logged[f"clip_fraction_{unit}"] = logged[f"clip_left_{unit}"] + logged[f"clip_right_{unit}"]
    return logged | _of_scored(value, sums)


def _of_scored(value: Mapping[str, float], sums: Sums) -> dict[str, float]:
    """Metrics of log-probs: means over the sequences that have some."""
    tokens, sequences = max(value["tokens"], 1.0), max(value["sequences"], 1.0)
    compared = {unit: value[f"{COMPARED}{unit}"] for unit in ("tokens", "sequences")}
    logged = {"entropy": value["negative_logprobs"] / tokens}
    logged |= _log_s(value, sums["log_s_histogram"].tolist(), sequences)
    # A part that is trained on before any update has not moved yet: it says nothing of the whole.
    if compared["tokens"] == value["tokens"]:
        logged |= {name: value[name] / tokens for name in ("policy_k1", "policy_k3")}
    if "mismatch_k" in value and (compared["tokens"] or not value["tokens"]):
        logged |= _mismatch(value, max(compared["tokens"], 1.0), max(compared["sequences"], 1.0))
    if "correction_weight" in value:
        logged["correction_weight_mean"] = value["correction_weight"] / tokens
        logged["correction_zero_tokens"] = value["correction_zero_tokens"] / tokens
    logged |= value_metrics(value, tokens)
    for name in ("reference_kl", TEACHER_KL):
        if name in value:
            logged[name] = value[name] / tokens
    return logged


def finalize_step(minibatches: Sequence[Sums]) -> dict[str, float]:
    """Logged metrics of one rollout batch, and the clip and log s metrics of its mini-batches as `name/minibatch_K`.

    Args:
        minibatches: sums of each optimizer step over all ranks, in order, on the host.
    """
    logged = finalize_metrics(add_sums(minibatches))
    for name in ("loss", VALUE_LOSS):
        if name in logged:
            logged[name] /= len(minibatches)
    for index, sums in enumerate(minibatches):
        one = finalize_metrics(sums)
        logged |= {f"{name}/minibatch_{index}": one[name] for name in PER_MINIBATCH if name in one}
    return logged


def group_metrics(rewards: Tensor, group_ids: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> dict[str, float]:
    """Logged metrics of a rollout batch's groups, on the host.

    Args:
        rewards: [N] scores.
        group_ids: [N] the group of each.
        bounds: lowest and highest score, `reward.bounds`: of a wrong and of a right response.
    """
    groups: dict[int, list[float]] = {}
    for reward, group in zip(rewards.tolist(), group_ids.tolist(), strict=True):
        groups.setdefault(group, []).append(reward)
    every, num_groups = [r for members in groups.values() for r in members], max(len(groups), 1)
    # In units of the largest, a power of two: no reward is too large for its square, and no digit changes.
    unit = 2.0 ** min(max(math.frexp(max(map(abs, every), default=0.0))[1], -1000), 1000)
    mean = sum(r / unit for r in every) / max(len(every), 1)
    flat = [members[0] for members in groups.values() if are_equal(members)]
    means = [sum(r / unit for r in members) / len(members) for members in groups.values()]
    middle = sum(means) / num_groups
    return {
        "reward_mean": mean * unit,
        "reward_std": math.sqrt(sum((r / unit - mean) ** 2 for r in every) / max(len(every), 1)) * unit,
        "reward_group_std": math.sqrt(sum((m - middle) ** 2 for m in means) / max(len(means) - 1, 1)) * unit,
        "groups": float(len(groups)),
        "zero_variance_groups": len(flat) / num_groups,
        "solved_groups": sum(reward >= bounds[1] for reward in flat) / num_groups,
        "unsolved_groups": sum(reward <= bounds[0] for reward in flat) / num_groups,
    }


def _log_s(value: Mapping[str, float], histogram: Sequence[Sequence[float]], sequences: float) -> dict[str, float]:
    mean = value["log_s"] / sequences
    logged = {
        "log_s_mean": mean,
        "log_s_std": math.sqrt(max(value["log_s_square"] / sequences - mean**2, 0.0)),
        "log_s_noise": math.sqrt(value["log_s_square_length"] / sequences),
        "log_s_abs_max": value["log_s_abs/max"],
    }
    overall = [sum(column) for column in zip(*histogram, strict=True)]
    logged |= {f"log_s_{name}": quantile(overall, q) for name, q in _QUANTILES.items() if sum(overall) > 0}
    for bucket, counts in zip(BUCKET_NAMES, histogram, strict=True):
        if sum(counts) > 1e-6:
            logged[f"sequences/{bucket}"] = sum(counts)
            logged |= {f"log_s_{name}/{bucket}": quantile(counts, q) for name, q in _QUANTILES.items()}
    return logged


def quantile(counts: Sequence[float], fraction: float) -> float:
    """log s below which a fraction of a histogram row lies, to the width of a bin (26 % of the value)."""
    reached = fraction * sum(counts) * (1 - 1e-12)
    below = accumulate(counts)
    side = next(at for at, count in enumerate(below) if count > 0 and count >= reached) - SIDE_BINS
    if side == 0:
        return 0.0
    return math.copysign(10.0 ** (SMALLEST_EXPONENT + (abs(side) - 0.5) / BINS_PER_DECADE), side)


def _mismatch(value: Mapping[str, float], tokens: float, sequences: float) -> dict[str, float]:
    k, k_square = value["mismatch_k"], value["mismatch_k_square"]
    p, q = value["mismatch_p_trainer"] / tokens, value["mismatch_p_sampler"] / tokens
    covariance = value["mismatch_p_product"] / tokens - p * q
    spread = value["mismatch_p_trainer_square"] / tokens - p * p
    spread *= value["mismatch_p_sampler_square"] / tokens - q * q
    log_trainer = value["mismatch_log_ppl_trainer"] / sequences
    log_sampler = value["mismatch_log_ppl_sampler"] / sequences
    return {
        "mismatch_k1": value["mismatch_k1"] / tokens,
        "mismatch_k3": value["mismatch_k3"] / tokens,
        "mismatch_ratio_mean": k / tokens,
        "mismatch_ratio_max": value["mismatch_k/max"],
        "mismatch_abs_max": value["mismatch_abs/max"],
        "mismatch_ess": k * k / (tokens * k_square) if k_square > 0 else 1.0,
        "mismatch_chi2": k_square / tokens - 1,
        "mismatch_chi2_sequences": value["mismatch_sequence_k_square"] / sequences - 1,
        "mismatch_f2": value["mismatch_outside_2"] / tokens,
        "mismatch_outside_icepop": value["mismatch_outside_icepop"] / tokens,
        "mismatch_dp_mean": value["mismatch_dp"] / tokens,
        "mismatch_dp_max": value["mismatch_dp/max"],
        # Undefined where one side hardly varies; 1 there, like two equal constants.
        "mismatch_correlation": covariance / math.sqrt(spread) if spread > 1e-20 else 1.0,
        "mismatch_log_ppl_trainer": log_trainer,
        "mismatch_log_ppl_sampler": log_sampler,
        "mismatch_ppl_ratio": math.exp(min(log_trainer - log_sampler, LARGEST)),
    }
