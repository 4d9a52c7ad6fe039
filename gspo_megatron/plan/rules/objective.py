"""Rules of the objective: combinations of axes that contradict each other, or that are not what their name promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from gspo_megatron.config.objective_spec import DRIFT_MASKS, ObjectiveSpec
from gspo_megatron.plan.rules.token_advantages import axis_findings
from gspo_megatron.types import Finding, Severity

PAPER_BAND, PAPER_LENGTH = 3.5e-4, 10_000
"""Width of GSPO's published clip band, and the response length in tokens that it suits."""
PRODUCT_LENGTH = 256
"""Tokens up to which a product of token weights is usable. At 1.5e-3 nats per token its log is -0.4 there."""
_BANDED = ("clip", "dual_clip", "mask")
_TOKEN_WEIGHTS = ("tis", "mis", "icepop")
_NORMALISED = ("std", "batch", "batch_std", "gae")


def findings(
    spec: ObjectiveSpec,
    *,
    updates: int | None = None,
    answers: int | None = None,
    max_answer_tokens: int | None = None,
) -> list[Finding]:
    """Check an objective. A rule that requires a number which is None is skipped.

    Args:
        spec: the effective objective.
        updates: optimizer steps per rollout batch.
        answers: responses per prompt.
        max_answer_tokens: response limit, tokens.
    """
    found = [*_ratio(spec, updates, max_answer_tokens), *_correction(spec, max_answer_tokens), *_kl(spec)]
    found += [*_lengths(spec, max_answer_tokens), *_groups(spec, answers), *axis_findings(spec), *_inert(spec)]
    return found


def typical_band(max_answer_tokens: int) -> float:
    """Return the half-width of a sequence clip that matches the noise of log s, which falls with 1/sqrt(length)."""
    return PAPER_BAND * max(1.0, math.sqrt(PAPER_LENGTH / max_answer_tokens))


def _say(code: str, severity: Severity, key: str, message: str, fix: str) -> Finding:
    return Finding(code, severity, f"objective.{key}", message, fix)


def _ratio(spec: ObjectiveSpec, updates: int | None, max_answer_tokens: int | None) -> Iterator[Finding]:
    if spec.per_sequence and spec.aggregation in ("token_mean", "constant"):
        yield _say(
            "token-mean-with-gspo", "error", "aggregation",
            f"{spec.aggregation} with ratio_level={spec.ratio_level} weights a response by its length, "
            "which the 1/length in the ratio is there to prevent",
            "use seq_mean_token_mean (gspo), or preset luspo to give long responses more weight",
        )  # fmt: skip
    if spec.trust == "log_clip" and not spec.per_sequence:
        yield _say(
            "log-clip-without-mean", "error", "trust",
            "log_clip bounds token log-ratios before they are averaged, but ratio_level=token averages nothing",
            "use ratio_level=sequence (gmpo) or trust=clip",
        )  # fmt: skip
    if spec.ratio_prefix != "none" and (spec.per_sequence or spec.trust == "log_clip"):
        yield _say(
            "prefix-without-token-ratio", "error", "ratio_prefix",
            f"{spec.ratio_prefix} is a factor of token ratios, but ratio_level={spec.ratio_level} has none",
            "use ratio_level=token (minpro), or ratio_prefix=none",
        )  # fmt: skip
    if spec.trust in _BANDED and max_answer_tokens is not None:
        yield from _band(spec, max_answer_tokens)
    if spec.trust == "dual_clip" and spec.dual_clip_bound <= 1 + spec.clip_high:
        yield _say(
            "dual-clip-inside-band", "error", "dual_clip_bound",
            f"{spec.dual_clip_bound:g} lies inside the band that ends at {1 + spec.clip_high:g}",
            "set it well above, e.g. 3",
        )  # fmt: skip
    if spec.ratio_reference != "recomputed" and spec.per_sequence and spec.clip_low < 2e-3 and spec.trust in _BANDED:
        yield _say(
            "sampler-logprobs-as-old", "warning", "ratio_reference",
            f"clip_low={spec.clip_low:g} around the sampler's log-probs: two engines differ by about 1.5e-3 nats per "
            "token on a mixture of experts, so nearly every negative response is clipped before the first update",
            "use ratio_reference=recomputed",
        )  # fmt: skip
    if updates == 1 and spec.ratio_reference == "recomputed" and spec.trust in (*_BANDED, "log_clip", "soft_gate"):
        # A warning must be acknowledged with a reason: a run called GSPO that never clips requires one.
        code, severity = ("gspo-inert", "warning") if spec.per_sequence else ("ratio-inert", "info")
        yield _say(
            code, severity, "trust",
            "one update per batch: every ratio is 1, so nothing is ever clipped and ratio_level makes no difference",
            "leave it for an on-policy run, or set batch.updates=4 as in the GSPO paper",
        )  # fmt: skip


def _band(spec: ObjectiveSpec, max_answer_tokens: int) -> Iterator[Finding]:
    widest, narrowest = max(spec.clip_low, spec.clip_high), min(spec.clip_low, spec.clip_high)
    typical = typical_band(max_answer_tokens) if spec.per_sequence else 0.2
    usual = f"about {typical:.1e} for {spec.ratio_level} ratios of {max_answer_tokens} tokens"
    key = "clip_high" if spec.clip_high == widest else "clip_low"
    if spec.per_sequence and widest > 10 * typical:
        yield _say(
            "clip-too-wide", "warning", key,
            f"{widest:g} is {widest / typical:.0f} times the noise of a sequence ratio: it never clips, "
            "so this is an unclipped policy gradient",
            f"set it to {usual}",
        )  # fmt: skip
    if spec.clip_low > spec.clip_high:
        yield _say(
            "clip-low-above-high", "warning", "clip_low",
            f"{spec.clip_low:g} is above clip_high={spec.clip_high:g}: bad responses are pushed away further than good "
            "ones are reinforced; public recipes have clip_low <= clip_high",
            f"set it to at most {spec.clip_high:g}",
        )  # fmt: skip
    if narrowest < typical / 10:
        key = "clip_low" if spec.clip_low == narrowest else "clip_high"
        yield _say(
            "clip-too-narrow", "warning", key,
            f"{narrowest:g} is {typical / max(narrowest, 1e-12):.0f} times narrower than the ratios it bounds: "
            "about half of every batch is clipped",
            f"set it to {usual}, or to null for the preset's",
        )  # fmt: skip


def _correction(spec: ObjectiveSpec, max_answer_tokens: int | None) -> Iterator[Finding]:
    weights = [name for name in spec.correction if name in _TOKEN_WEIGHTS]
    if len(weights) > 1 or len(set(spec.correction)) < len(spec.correction):
        yield _say(
            "correction-twice", "error", "correction",
            f"{list(spec.correction)} multiplies the token weight in {max(len(weights), 2)} times",
            "keep one of tis, mis, icepop",
        )  # fmt: skip
    if spec.ratio_reference == "sampler" and not DRIFT_MASKS.issuperset(spec.correction):
        yield _say(
            "correction-twice", "error", "correction",
            f"{list(spec.correction)} corrects a gap that ratio_reference=sampler already has inside the ratio",
            "use ratio_reference=recomputed with the correction, or no correction",
        )  # fmt: skip
    if "sequence_product" in spec.correction and (max_answer_tokens or 0) > PRODUCT_LENGTH:
        yield _say(
            "sequence-product-at-length", "error", "correction",
            f"sequence_product multiplies up to {max_answer_tokens} token weights: at 1.5e-3 nats per token that is "
            f"exp(-{1.5e-3 * (max_answer_tokens or 0):.1f})",
            "use tis, icepop or geometric_mask",
        )  # fmt: skip
    for low, high in (("geometric_low", "geometric_high"), ("mask_low", "mask_high")):
        lower, upper = getattr(spec, low), getattr(spec, high)
        if lower is not None and upper is not None and lower >= upper:
            yield _say("empty-band", "error", low, f"{lower:g} is not below {high}={upper:g}", "swap or widen them")


def _kl(spec: ObjectiveSpec) -> Iterator[Finding]:
    if spec.kl == "none":
        return
    if spec.kl_coefficient == 0:
        yield _say(
            "kl-coefficient-zero", "error", "kl_coefficient",
            f"kl={spec.kl} with coefficient 0 costs a reference pass and changes nothing",
            "set kl_coefficient, e.g. 1e-3, or kl=none",
        )  # fmt: skip
    if spec.kl == "k1" and spec.kl_in == "loss":
        yield _say(
            "kl-k1-in-loss", "error", "kl",
            "the gradient of k1 has mean 0 on the policy's own samples for any reference: in the loss it is noise",
            "use k2 or k3 in the loss, or kl_in=reward",
        )  # fmt: skip
    if spec.kl == "k3_unbiased" and spec.kl_in == "reward":
        yield _say(
            "kl-unbiased-in-reward", "error", "kl",
            "k3_unbiased weights by the current ratio, which is 1 when rewards are computed", "use k3, or kl_in=loss",
        )  # fmt: skip


def _lengths(spec: ObjectiveSpec, max_answer_tokens: int | None) -> Iterator[Finding]:
    if spec.aggregation == "constant" and spec.aggregation_length is None and max_answer_tokens is None:
        yield _say(
            "aggregation-length-missing", "error", "aggregation_length",
            "aggregation=constant divides by it, but it is null", "set it, e.g. to rollout.max_answer_tokens",
        )  # fmt: skip
    length, limit = spec.aggregation_length, max_answer_tokens
    if spec.aggregation == "constant" and length and limit and not limit / 20 <= length <= 20 * limit:
        yield _say(
            "aggregation-length-far", "warning", "aggregation_length",
            f"{length} beside responses of up to {limit} tokens: the loss, and with it every step, is "
            f"{limit / length:.3g} times that of rollout.max_answer_tokens",
            f"set it to null, which takes {limit}",
        )  # fmt: skip
    if spec.overlong != "soft":
        return
    if spec.overlong_buffer is None:
        yield _say(
            "overlong-buffer-missing", "error", "overlong_buffer",
            "overlong=soft grows its penalty over it, but it is null", "set it, e.g. to a fifth of the response limit",
        )  # fmt: skip
    elif max_answer_tokens is not None and spec.overlong_buffer > max_answer_tokens:
        yield _say(
            "overlong-buffer-too-long", "error", "overlong_buffer",
            f"{spec.overlong_buffer} is more than rollout.max_answer_tokens={max_answer_tokens}", "set it to a fifth",
        )  # fmt: skip
    elif max_answer_tokens is not None and not 0.01 <= spec.overlong_buffer / max_answer_tokens <= 0.75:
        yield _say(
            "overlong-buffer-unusual", "warning", "overlong_buffer",
            f"{spec.overlong_buffer} of {max_answer_tokens} tokens: "
            + ("nearly every response is penalised" if spec.overlong_buffer > 1 / 2 * max_answer_tokens else
               "the penalty jumps instead of growing"),
            f"set it to about a fifth, {max_answer_tokens // 5} (DAPO: 4,096 of 20,480)",
        )  # fmt: skip


def _groups(spec: ObjectiveSpec, answers: int | None) -> Iterator[Finding]:
    if answers == 1 and spec.advantage not in ("batch", "gae", "teacher"):
        yield Finding(
            "group-of-one", "error", "batch.answers",
            f"with 1 response per prompt advantage={spec.advantage} compares nothing: every advantage is 0",
            "set it to 2 or more, e.g. 8",
        )  # fmt: skip
    below = {"overlong=soft": spec.overlong == "soft", "kl_in=reward": spec.kl != "none" and spec.kl_in == "reward"}
    for name in (name for name, is_set in below.items() if spec.advantage == "maxrl" and is_set):
        yield _say(
            "rewards-below-zero", "error", "advantage",
            f"maxrl divides by the mean reward, and {name} takes from rewards",
            f"use advantage=std, or leave {name.split('=')[0]} unset",
        )  # fmt: skip


def _own(spec: ObjectiveSpec) -> bool:
    return ":" in spec.trust


_READ_WHEN: dict[str, Callable[[ObjectiveSpec], bool]] = {
    "advantage_ddof": lambda s: s.advantage in _NORMALISED,
    "advantage_eps": lambda s: s.advantage in _NORMALISED,
    "gae_discount": lambda s: s.has_critic,
    "gae_decay": lambda s: s.has_critic,
    "value_clip": lambda s: s.has_critic,
    "value_coefficient": lambda s: s.has_critic,
    "clip_low": lambda s: s.trust in (*_BANDED, "log_clip") or _own(s),
    "clip_high": lambda s: s.trust in (*_BANDED, "log_clip") or _own(s),
    "dual_clip_bound": lambda s: s.trust == "dual_clip" or _own(s),
    "ratio_cap": lambda s: s.trust == "detached_clip" or _own(s),
    "tau_positive": lambda s: s.trust == "soft_gate" or _own(s),
    "tau_negative": lambda s: s.trust == "soft_gate" or _own(s),
    "options": _own,
    "tis_cap": lambda s: "tis" in s.correction or "sequence_product" in s.correction,
    "mask_low": lambda s: "mis" in s.correction or "icepop" in s.correction,
    "mask_high": lambda s: "mis" in s.correction or "icepop" in s.correction,
    "geometric_low": lambda s: "geometric_mask" in s.correction,
    "geometric_high": lambda s: "geometric_mask" in s.correction,
    "opsm_delta": lambda s: "opsm" in s.correction,
    "trust_region_delta": lambda s: "trust_region_mask" in s.correction,
    "veto_below": lambda s: "veto" in s.correction,
    "aggregation_length": lambda s: s.aggregation == "constant",
    "kl_in": lambda s: s.kl != "none",
    "kl_coefficient": lambda s: s.kl != "none",
    "overlong_buffer": lambda s: s.overlong == "soft",
}


def is_read(spec: ObjectiveSpec, axis: str) -> bool:
    """Whether an axis changes what this objective computes."""
    read_when = _READ_WHEN.get(axis)
    return read_when is None or read_when(spec)


def _inert(spec: ObjectiveSpec) -> Iterator[Finding]:
    for key in _READ_WHEN:
        value = getattr(spec, key)
        if not is_read(spec, key) and value != type(spec).model_fields[key].get_default(call_default_factory=True):
            yield _say(
                "objective-key-inert", "warning", key,
                f"{value} is not read by {spec.name} with trust={spec.trust}, advantage={spec.advantage}, "
                f"correction={list(spec.correction)}, aggregation={spec.aggregation}, kl={spec.kl}, "
                f"overlong={spec.overlong}",
                "remove it (null takes the preset's value), or choose the axis that reads it",
            )  # fmt: skip
