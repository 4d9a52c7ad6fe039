"""What a running job should say about its own objective, as findings."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.types import Finding

MOSTLY_CLIPPED = 0.45
"""Share of a mini-batch: at 0.5 every answer that should become less likely is clipped and every other one is not."""
UNMOVED = 1e-6
"""Largest |log s| that rounding can leave where no weight has changed."""
MOSTLY_TRUNCATED = 0.5
"""Share of the responses above which a rule for long ones decides what is learned."""


def runtime_warnings(spec: ObjectiveSpec, metrics: Mapping[str, float]) -> list[Finding]:
    """Findings about one rollout batch.

    Args:
        spec: the effective objective.
        metrics: `finalize_step` of the batch, with `group_metrics` merged in where the rewards are at hand.
    """
    found = [_constant_reward(spec, metrics), _mostly_clipped(metrics), _first_minibatch_moved(spec, metrics)]
    found += [_mismatch_wider_than_band(spec, metrics), _nonfinite(metrics), _unscored(metrics)]
    found.append(_mostly_truncated(spec, metrics))
    return [finding for finding in found if finding is not None]


def _constant_reward(spec: ObjectiveSpec, metrics: Mapping[str, float]) -> Finding | None:
    if spec.has_teacher or metrics.get("zero_variance_groups", 0.0) < 1.0:
        return None
    return Finding(
        "constant-reward", "warning", "reward",
        f"all {metrics['groups']:.0f} groups have equal rewards within the group (mean {metrics['reward_mean']:.3g}), "
        "so every advantage is 0 and nothing is learned",
        "check the reward on a few answers; if it is right, change the difficulty of the problems",
    )  # fmt: skip


def _mostly_clipped(metrics: Mapping[str, float]) -> Finding | None:
    name = "clip_fraction_sequences"
    fractions = {key: metrics[key] for key in metrics if key == name or key.startswith(f"{name}/")}
    worst = max(fractions, key=lambda key: fractions[key], default=None)
    if worst is None or fractions[worst] <= MOSTLY_CLIPPED:
        return None
    left = metrics.get(worst.replace("clip_fraction", "clip_left"), math.nan)
    return Finding(
        "mostly-clipped", "warning", "objective.clip_low",
        f"{fractions[worst]:.0%} of the sequences are clipped ({worst}), {left:.0%} on the left: "
        "the policy moves further in one batch than the band allows",
        "lower optimizer.lr or batch.updates, or widen the band in proportion to 1/sqrt(answer length)",
    )  # fmt: skip


def _first_minibatch_moved(spec: ObjectiveSpec, metrics: Mapping[str, float]) -> Finding | None:
    moved = metrics.get("log_s_abs_max/minibatch_0", 0.0)
    clipped = metrics.get("clip_fraction_tokens/minibatch_0", 0.0)
    if spec.ratio_reference != "recomputed" or (moved <= UNMOVED and clipped == 0):
        return None
    return Finding(
        "first-minibatch-moved", "warning", "objective.ratio_reference",
        f"before any update |log s| reaches {moved:.1e} and {clipped:.1%} of the tokens are clipped, "
        f"but old and current log-probs are of the same weights and must agree to {UNMOVED:.0e}",
        "look for stale weights, dropout, or a routing that differs between the two forwards",
    )  # fmt: skip


def _mismatch_wider_than_band(spec: ObjectiveSpec, metrics: Mapping[str, float]) -> Finding | None:
    if not spec.per_sequence or spec.trust not in ("clip", "dual_clip", "mask"):
        return None
    band = min(spec.clip_low, spec.clip_high)
    if spec.ratio_reference != "recomputed":
        # Nobody recomputed the old log-probs: the first mini-batch's log s is the gap.
        gap, severity = abs(metrics.get("log_s_p50/minibatch_0", 0.0)), "warning"
        gap = max(gap, abs(metrics.get("mismatch_k1", 0.0)))
    else:
        gap, severity = abs(metrics.get("mismatch_k1", 0.0)), "info"
    if gap <= band:
        return None
    return Finding(
        "mismatch-wider-than-band", severity, "objective.ratio_reference",
        f"sampler and trainer differ by {gap:.1e} nats a token, the clip band is {band:.1e} wide",
        "keep ratio_reference=recomputed, and add correction=[tis] or routing replay; never divide by the sampler's "
        "log-probs under this band",
    )  # fmt: skip


def _nonfinite(metrics: Mapping[str, float]) -> Finding | None:
    if not metrics.get("nonfinite_tokens", 0.0):
        return None
    return Finding(
        "nonfinite-logprobs", "error", "objective",
        f"{metrics['nonfinite_tokens']:.0f} trained tokens have log-probs or advantages that are not finite",
        "run check_values on the batch, which names the tensor and the first index",
    )  # fmt: skip


def _unscored(metrics: Mapping[str, float]) -> Finding | None:
    kinds = {name.removeprefix("unscored/"): value for name, value in metrics.items() if name.startswith("unscored/")}
    if not kinds:
        return None
    return Finding(
        "unscored-responses", "warning", "reward.name",
        f"{sum(kinds.values()):.0f} responses have no score of their own ("
        + ", ".join(f"{value:.0f} {kind}" for kind, value in sorted(kinds.items()))
        + ") and count as wrong",
        "the controller's log quotes the first failure of each kind",
    )  # fmt: skip


def _mostly_truncated(spec: ObjectiveSpec, metrics: Mapping[str, float]) -> Finding | None:
    share = metrics.get("truncated", 0.0)
    if spec.overlong == "none" or share <= MOSTLY_TRUNCATED:
        return None
    consequence = {
        "filter": "not trained on, so nothing makes them shorter",
        "zero": "scored as wrong",
        "soft": "charged the whole penalty",
    }[spec.overlong]
    softer = "" if spec.overlong == "soft" else ", or set objective.overlong=soft, which charges by length"
    return Finding(
        "mostly-truncated", "warning", "objective.overlong",
        f"{share:.0%} of the responses are cut at their limit; with overlong={spec.overlong} they are {consequence}",
        f"raise rollout.max_answer_tokens{softer}",
    )  # fmt: skip
