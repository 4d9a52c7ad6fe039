"""Metric sums of one micro-batch, and how those of several micro-batches and ranks are combined.

An entry whose name ends in `/max` is combined by its maximum, every other entry by addition. Formulas and healthy
ranges: README.md beside this file. A sequence that is spread over context-parallel ranks counts once, because each
rank adds the share of its tokens that it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gspo_megatron.objective.bounded import bounded_exp, bounded_expm1
from gspo_megatron.objective.packed import Packed
from gspo_megatron.objective.trust import Surrogate

BINS_PER_DECADE = 10
SMALLEST_EXPONENT, LARGEST_EXPONENT = -8, 1
SIDE_BINS = BINS_PER_DECADE * (LARGEST_EXPONENT - SMALLEST_EXPONENT)
HISTOGRAM_BINS = 2 * SIDE_BINS + 1
"""Bins of log s: negative magnitudes from large to small, |log s| < 1e-8, positive ones from small to large."""
BUCKET_NAMES = ("le_64", "le_256", "le_1024", "le_4096", "le_16384", "le_65536", "gt_65536")
"""Trained tokens of a sequence: at most 64, at most 256, ... and more than 65536."""
MAXIMUM = "/max"
"""Ends the names of entries that are combined by their maximum."""
COMPARED = "compared_"
"""Begins the names of the counts of what has log-probs of the old policy: `tokens`, `sequences`."""
TEACHER_KL = "teacher_kl"
"""Sum over trained tokens of log p_old - log p_teacher."""

Sums = Mapping[str, Tensor]
"""Float64 scalars by name, and `log_s_histogram` [length buckets, bins]."""


def add_sums(parts: Sequence[Sums]) -> dict[str, Tensor]:
    """Combine the sums of micro-batches, ranks or mini-batches; all parts hold the same names. Does not synchronise."""
    total = dict(parts[0])
    for part in parts[1:]:
        for name, entry in part.items():
            total[name] = torch.maximum(total[name], entry) if name.endswith(MAXIMUM) else total[name] + entry
    return total


@torch.no_grad()
def metric_sums(
    packed: Packed,
    share: Tensor,
    current: Tensor,
    old: Tensor,
    sampler: Tensor | None,
    advantages: Tensor,
    surrogate: Surrogate,
    log_s: Tensor,
    factor: Tensor | None,
    divergence: Tensor | None,
) -> dict[str, Tensor]:
    """Named float64 sums; see README.md for what each becomes."""
    mask, fraction = packed.mask, packed.spread(1.0 / packed.num_tokens.clamp(min=1))
    low, high = surrogate.low & mask, surrogate.high & mask
    zero = low | high | ((advantages == 0) & mask)
    if factor is not None:
        zero = zero | ((factor == 0) & mask)
    shift = current - old
    finite = torch.isfinite(shift + advantages if sampler is None else shift + advantages + sampler)
    sums = {
        "loss": share.detach(),
        "tokens": mask.sum(dtype=torch.float64),
        "sequences": packed.local_share().sum(),
        "clip_low_tokens": low.sum(dtype=torch.float64),
        "clip_high_tokens": high.sum(dtype=torch.float64),
        "clip_low_sequences": (fraction * low).sum(),
        "clip_high_sequences": (fraction * high).sum(),
        "zero_tokens": zero.sum(dtype=torch.float64),
        "zero_sequences": (fraction * zero).sum(),
        "zero_advantage_sequences": (fraction * ((advantages == 0) & mask)).sum(),
        "policy_k1": -shift.sum(),
        "policy_k3": (bounded_expm1(shift) - shift).sum(),
        "negative_logprobs": -current.sum(),
        "nonfinite_tokens": (~finite).sum(dtype=torch.float64),
    }
    sums.update(_log_s_sums(packed, log_s))
    if sampler is not None:
        sums.update(_mismatch_sums(packed, fraction, old, sampler))
    if factor is not None:
        sums["correction_weight"] = torch.where(mask, factor, 0.0).sum()
        sums["correction_zero_tokens"] = ((factor == 0) & mask).sum(dtype=torch.float64)
    if divergence is not None:
        sums["reference_kl"] = torch.where(mask, divergence, 0.0).sum()
    return sums


@torch.no_grad()
def compared_sums(packed: Packed, sums: Sums, is_compared: bool) -> dict[str, Tensor]:
    """How much has log-probs of the old policy, and the sums over it: nothing where they were not computed."""
    counts = {"tokens": sums["tokens"], "sequences": packed.local_share().sum()}
    found = {f"{COMPARED}{unit}": count for unit, count in counts.items()}
    found |= {name: entry for name, entry in sums.items() if name.startswith(("policy_", "mismatch_"))}
    return found if is_compared else {name: torch.zeros_like(entry) for name, entry in found.items()}


def length_bucket(num_tokens: Tensor) -> Tensor:
    """[S] int64, place in `BUCKET_NAMES`, of [S] lengths."""
    # log2 / 2 - 3 is 0 at 64 tokens and rises by one with every factor of four.
    return (torch.log2(num_tokens.clamp(min=1)) / 2 - 3).ceil().clamp(0, len(BUCKET_NAMES) - 1).long()


def _log_s_sums(packed: Packed, log_s: Tensor) -> dict[str, Tensor]:
    share = packed.local_share()
    bucket = length_bucket(packed.num_tokens)
    magnitude = torch.log10(log_s.abs().clamp(min=10.0 ** (SMALLEST_EXPONENT - 1))) - SMALLEST_EXPONENT
    # A NaN would become an index out of bounds, which on a GPU ends the process; nonfinite_tokens counts it.
    step = (magnitude * BINS_PER_DECADE).floor().clamp(-1, SIDE_BINS - 1).nan_to_num(-1.0).long() + 1
    where = bucket * HISTOGRAM_BINS + SIDE_BINS + torch.where(log_s < 0, -step, step)
    counts = torch.zeros(len(BUCKET_NAMES) * HISTOGRAM_BINS, dtype=torch.float64, device=log_s.device)
    return {
        "log_s": (share * log_s).sum(),
        "log_s_square": (share * log_s.square()).sum(),
        "log_s_square_length": (share * log_s.square() * packed.num_tokens).sum(),
        "log_s_abs/max": _largest(log_s.abs()),
        "log_s_histogram": counts.index_add_(0, where, share).view(len(BUCKET_NAMES), HISTOGRAM_BINS),
    }


def _mismatch_sums(packed: Packed, fraction: Tensor, old: Tensor, sampler: Tensor) -> dict[str, Tensor]:
    mask = packed.mask
    log_k = old - sampler
    k = bounded_exp(log_k)
    p_trainer, p_sampler = packed.trained(old.exp()), packed.trained(sampler.exp())
    gap = (p_trainer - p_sampler).abs()
    return {
        "mismatch_k": packed.trained(k).sum(),
        "mismatch_k_square": packed.trained(k.square()).sum(),
        "mismatch_k1": -log_k.sum(),
        "mismatch_k3": (bounded_expm1(log_k) - log_k).sum(),
        "mismatch_k/max": _largest(packed.trained(k)),
        "mismatch_abs/max": _largest(log_k.abs()),
        "mismatch_outside_2": ((log_k.abs() > 0.6931471805599453) & mask).sum(dtype=torch.float64),
        "mismatch_outside_icepop": (((k < 0.5) | (k > 5)) & mask).sum(dtype=torch.float64),
        "mismatch_sequence_k_square": (packed.local_share() * bounded_exp(2 * packed.means(log_k))).sum(),
        "mismatch_log_ppl_trainer": -(fraction * old).sum(),
        "mismatch_log_ppl_sampler": -(fraction * sampler).sum(),
        "mismatch_dp": gap.sum(),
        "mismatch_dp/max": _largest(gap),
        "mismatch_p_trainer": p_trainer.sum(),
        "mismatch_p_sampler": p_sampler.sum(),
        "mismatch_p_trainer_square": p_trainer.square().sum(),
        "mismatch_p_sampler_square": p_sampler.square().sum(),
        "mismatch_p_product": (p_trainer * p_sampler).sum(),
    }


def _largest(values: Tensor) -> Tensor:
    """The maximum, 0 for an empty tensor."""
    return torch.cat([values, values.new_zeros(1)]).amax()
