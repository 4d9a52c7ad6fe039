"""Advantages from rewards, relative to a group or from a value function, and those of a teacher.

Host-side arithmetic on one number an answer: it runs once a rollout batch, on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    normalize: str = "std",
    ddof: int = 0,
    eps: float = 0.0,
) -> Tensor:
    """[N] rewards -> [N] advantages; groups may differ in size and lie in any order.

    A group whose rewards are all equal, or of one member, gives exactly 0: no `eps` is needed to keep it finite. With
    `batch` the whole batch is the group.

    Args:
        rewards: [N].
        group_ids: [N] any integers; equal ids are one group.
        normalize: std = (r - mean) / (std + eps); mean = r - mean; rloo = r - mean of the others; batch = std with the
            whole batch as one group; batch_std = (r - group mean) / (std of those over the whole batch + eps) (both:
            REINFORCE++, arXiv 2501.03262, equation 10, over responses); maxrl = (r - mean) / mean, for rewards of at
            least 0 (MaxRL, arXiv 2602.02710: with rewards 0 and 1 the gradient of log pass rate).
        ddof: degrees of freedom taken off in the std.
        eps: added to the std.

    Raises:
        ValueError: another `normalize`, shapes that differ, a reward that is not finite, or below 0 with maxrl.
    """
    _check_rewards(rewards, group_ids)
    if normalize == "maxrl" and bool((rewards < 0).any()):
        least = float(rewards.min())
        raise ValueError(f"advantage=maxrl divides by the mean reward, and one is {least:g}; keep them at least 0")
    if normalize == "batch":
        group_ids, normalize = torch.zeros_like(group_ids), "std"
    group, num_groups = number_groups(group_ids)
    size = _per_group(torch.ones_like(rewards, dtype=torch.float64), group, num_groups)
    # Each group in units of its own: squares and sums of rewards near 1e-200 or 1e200 are numbers too.
    exponents = _exponents(rewards.double(), group, num_groups)
    values = rewards.double() * _power_of_two(-exponents[group])
    # Rewards of 0.1 have a rounded mean and with it a std of 1e-17: only the spread tells an exactly equal group.
    flat = equal_groups(values, group, num_groups)[group]
    mean = (_per_group(values, group, num_groups) / size)[group]
    centered = torch.where(flat, 0.0, values - mean)
    if normalize == "rloo":
        centered = centered * (size / (size - 1).clamp(min=1))[group]
    elif normalize == "std":
        variance = _per_group(centered.square(), group, num_groups) / (size - ddof).clamp(min=1)
        divisor = variance.sqrt() + eps * _power_of_two(-exponents)
        centered = torch.where(flat, 0.0, centered / divisor[group])
    elif normalize == "maxrl":
        centered = torch.where(flat, 0.0, centered / mean)
    elif normalize == "batch_std":
        spread = exponents[group][~flat]
        unit = spread.max() if len(spread) else spread.new_zeros(())
        centered = centered * _power_of_two(exponents[group] - unit)
        variance = centered.square().sum() / max(centered.numel() - ddof, 1)
        centered = torch.where(flat, 0.0, centered / (variance.sqrt() + eps * _power_of_two(-unit)))
    elif normalize != "mean":
        raise ValueError(f"normalize={normalize} is not known; use std, mean, rloo, batch, batch_std or maxrl")
    if normalize in ("mean", "rloo"):
        centered = centered * _power_of_two(exponents[group])
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float64
    largest = torch.finfo(dtype).max
    return centered.clamp(-largest, largest).to(dtype)


def generalized_advantages(
    rewards: Tensor, values: Tensor, loss_mask: Tensor, cu_seqlens: Tensor, discount: float = 1.0, decay: float = 0.95
) -> Tensor:
    """[T] token advantages from a value function (GAE), 0 at untrained positions, which are stepped over.

    delta_t = r_t + discount V_next - V_t and A_t = delta_t + discount decay A_next, where `next` is the next trained
    token of the sequence, and V and A beyond its last one are 0.

    Args:
        rewards: [T] reward given at each token.
        values: [T] value of the state before each token.
        loss_mask: [T] bool.
        cu_seqlens: [S+1].
        discount: factor a token.
        decay: lambda; 0 = one-step, 1 = Monte Carlo.
    """
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    bounds = cu_seqlens.tolist()
    trained = loss_mask.nonzero().flatten().tolist()
    reward, value = rewards.tolist(), values.tolist()
    sequence, next_value, next_advantage = len(bounds) - 2, 0.0, 0.0
    for at in reversed(trained):
        while at < bounds[sequence]:
            sequence, next_value, next_advantage = sequence - 1, 0.0, 0.0
        next_advantage = reward[at] + discount * next_value - value[at] + discount * decay * next_advantage
        next_value = value[at]
        advantages[at] = next_advantage
    return advantages.to(rewards.dtype)


def normalize_tokens(
    advantages: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    sum_over_ranks: Callable[[Tensor], Tensor],
    ddof: int,
    eps: float,
    counts: bool = True,
) -> list[Tensor]:
    """(A - mean) / (std + eps) over the trained tokens of a whole rollout batch, 0 at untrained ones.

    Args:
        advantages: [T] float64 of each micro-batch of this rank.
        loss_masks: [T] bool of each.
        sum_over_ranks: adds a float64 tensor over all ranks.
        ddof: degrees of freedom taken off in the std.
        eps: added to the std.
        counts: whether this rank adds its tokens: one of those that hold the same ones does.
    """
    nothing = torch.zeros(1, dtype=torch.float64, device=loss_masks[0].device if loss_masks else None)
    kept = [torch.where(mask, one, 0.0) for one, mask in zip(advantages, loss_masks, strict=True)]
    count = sum((mask.sum(dtype=torch.float64) for mask in loss_masks), nothing)
    count, total = sum_over_ranks(torch.cat([count, sum((one.sum() for one in kept), nothing)]) * counts).split(1)
    mean = total / count.clamp(min=1)
    centered = [torch.where(mask, one - mean, 0.0) for one, mask in zip(kept, loss_masks, strict=True)]
    square = sum_over_ranks(sum((one.square().sum() for one in centered), nothing) * counts)
    std = (square / (count - ddof).clamp(min=1)).sqrt()
    # Equal advantages have a rounded mean and with it a std of 1e-16 of it.
    flat = std <= 1e-12 * mean.abs()
    return [torch.where(flat, 0.0, one / (std + eps)) for one in centered]


def teacher_advantages(teacher: Tensor, old: Tensor, loss_mask: Tensor) -> Tensor:
    """[T] float64 log p_teacher(y_t | before) - log p_old(y_t | before), 0 at untrained positions.

    The reverse KL divergence of one next token, sum over y of p(y) (log p(y) - log p_teacher(y)), has the gradient
    E_p[(log p(y) - log p_teacher(y)) grad log p(y)]. One sampled token estimates it, so its negative is the advantage
    of that token alone: the divergence at later tokens does not count (GKD, arXiv 2306.13649, which takes no gradient
    through sampling; "On-Policy Distillation", Thinking Machines 2025: discount 0).

    Args:
        teacher: [T] the teacher's log-probs of the sampled tokens.
        old: [T] the trainer's own under the weights before the first update, which are the ones that learn; the
            sampler's would add the gap between two engines, and under staleness be another policy's.
        loss_mask: [T] bool.
    """
    return torch.where(loss_mask, teacher.double() - old.double(), 0.0)


def number_groups(group_ids: Tensor) -> tuple[Tensor, int]:
    """[N] any ids -> [N] 0..M-1, and M."""
    _, group = torch.unique(group_ids, return_inverse=True)
    return group, int(group.max()) + 1 if group.numel() else 0


def equal_groups(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """[M] bool: groups whose values are all the same number."""
    highest = values.new_full((num_groups,), -torch.inf).scatter_reduce(0, group, values, "amax")
    lowest = values.new_full((num_groups,), torch.inf).scatter_reduce(0, group, values, "amin")
    return highest == lowest


def _exponents(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """[M] exponent of the largest value of each group; a shift by it changes no digit."""
    largest = values.new_zeros(num_groups).scatter_reduce(0, group, values.abs(), "amax")
    return torch.frexp(largest).exponent.long().clamp(-1000, 1000)


def _power_of_two(exponents: Tensor) -> Tensor:
    """float64 2^n, exact, which torch.exp2 is not on every processor: the exponent's bits are written."""
    return (exponents.clamp(-1022, 1023) + 1023 << 52).view(torch.float64)


def _per_group(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    return values.new_zeros(num_groups).index_add(0, group, values)


def _check_rewards(rewards: Tensor, group_ids: Tensor) -> None:
    if rewards.dim() != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards {list(rewards.shape)} and group_ids {list(group_ids.shape)} must both be [N], one id a reward"
        )
    bad = torch.nonzero(~torch.isfinite(rewards))
    if bad.numel():
        at = int(bad[0])
        raise ValueError(f"rewards {list(rewards.shape)} is {float(rewards[at])} at index {at}; it must be finite")
