"""The effective objective in one sentence."""

from __future__ import annotations

from pathlib import Path

from gspo_megatron.config.axes import Axes

_ADVANTAGES = {
    "mean": "advantage r - group mean",
    "rloo": "advantage r - mean of the others",
    "batch": "advantage (r - batch mean) / batch std",
    "batch_std": "advantage (r - group mean) / batch std",
    "maxrl": "advantage (r - mean) / mean",
    "teacher": "advantage log p(teacher) - log p(old) of each token, rewards only measured",
}
_FILTERS = {"dynamic_sampling": "groups of equal rewards replaced"}


def one_sentence(name: str, spec: Axes, sequences: int | None, updates: int | None) -> str:
    """Describe an objective so that two different ones read differently.

    Defaults are left out: advantages normalised by the group's std, no rule for long responses, no group filter.
    """
    old = {
        "recomputed": "recomputed old policy",
        "sampler": "sampler's log-probs",
        "interpolated": "log-probs between the sampler's and the current",
    }[spec.ratio_reference]
    level = {"token": "token", "sequence": "sequence", "sequence_token": "sequence (token form)"}[spec.ratio_level]
    prefix = " x the least ratio before it" if spec.ratio_prefix == "minimum" else ""
    parts = [f"{name}: {level} ratio{prefix} vs {old}", _trust(spec), _aggregation(spec, sequences)]
    if updates is not None:
        parts.append(f"{updates} update{'s' if updates != 1 else ''} a batch")
    parts.append(_kl(spec))
    parts.append("+".join(_correction(spec, name) for name in spec.correction) or "no correction")
    parts.append("replay off" if spec.replay == "off" else f"replay of the {spec.replay}'s routes")
    if spec.advantage in _ADVANTAGES:
        parts.append(_ADVANTAGES[spec.advantage])
    if spec.advantage == "gae":
        parts.append(
            f"advantage GAE {spec.gae_discount:g}/{spec.gae_decay:g} over the batch's std, "
            f"{_number(spec.value_coefficient)} x value loss clipped +-{spec.value_clip:g}"
        )
    if spec.advantage in ("std", "batch", "batch_std", "gae") and (spec.advantage_ddof or spec.advantage_eps):
        parts.append(f"std with ddof {spec.advantage_ddof} and eps {spec.advantage_eps:g}")
    if spec.overlong != "none":
        parts.append(_overlong(spec))
    if spec.group_filter in _FILTERS:
        parts.append(_FILTERS[spec.group_filter])
    return ", ".join(parts)


def _number(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if 0 < value < 0.01 else f"{value:g}"


def _trust(spec: Axes) -> str:
    band = f"-{_number(spec.clip_low)}/+{_number(spec.clip_high)}"
    words = {
        "clip": f"clip {band}",
        "dual_clip": f"clip {band}, negative side at most {spec.dual_clip_bound:g}x",
        "detached_clip": f"weight detached and capped at {spec.ratio_cap:g}",
        "soft_gate": f"soft gate tau {spec.tau_positive:g}/{spec.tau_negative:g}",
        "mask": f"mask outside {band}",
        "log_clip": f"token log-ratios clipped {band} before the mean",
        "none": "no clip",
    }
    options = "".join(f" {key}={value:g}" for key, value in sorted(spec.options.items()))
    return words.get(spec.trust, f"trust rule {Path(spec.trust).name}{options}")


def _overlong(spec: Axes) -> str:
    return {
        "soft": f"soft overlong penalty over {spec.overlong_buffer} tokens",
        "zero": "truncated answers score 0",
        "filter": "truncated answers not trained on",
    }[spec.overlong]


def _aggregation(spec: Axes, sequences: int | None) -> str:
    over = "sequences" if sequences is None else f"{sequences} sequences"
    return {
        "seq_mean_token_mean": f"mean over tokens then over {over}",
        "token_mean": "mean over all trained tokens",
        "seq_mean_token_sum": f"sum over tokens then mean over {over}",
        "constant": f"sum over tokens / {spec.aggregation_length or 'the answer limit'}, mean over {over}",
    }[spec.aggregation]


def _kl(spec: Axes) -> str:
    return "no KL" if spec.kl == "none" else f"{_number(spec.kl_coefficient)} x KL {spec.kl} in the {spec.kl_in}"


def _correction(spec: Axes, name: str) -> str:
    low, high = spec.mask_bounds(name)
    return {
        "tis": f"token TIS capped at {spec.tis_cap:g}",
        "mis": f"MIS [{low:g}, {high:g}]",
        "icepop": f"IcePop [{low:g}, {high:g}]",
        "geometric_mask": f"geometric mask [{spec.geometric_low:g}, {spec.geometric_high:g}]",
        "sequence_product": f"sequence product capped at {spec.tis_cap:g}",
        "opsm": f"OPSM above {_number(spec.opsm_delta)}",
        "trust_region_mask": f"responses with a token KL above {_number(spec.trust_region_delta)} masked",
        "veto": f"veto below {_number(spec.veto_below)}",
    }[name]
