"""Slow, obvious float64 oracles, written from the formulas of the papers and from nothing else.

Every objective is a loop over sequences and tokens, maximised, with autograd through the formula as printed: the
sequence ratio is exp(mean(...)) with its gradient through the mean. A `Response` holds trained tokens only, so masks,
packing, ranks and micro-batches do not exist here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Response:
    """The trained tokens of one sequence, each field [n] float64."""

    logp: Tensor
    """Current policy; requires grad where a gradient is wanted."""
    old: Tensor
    """Policy at the start of the rollout batch."""
    advantage: Tensor
    """One a token."""
    sampler: Tensor | None = None
    reference: Tensor | None = None
    value: Tensor | None = None
    """The critic's, of the state before each token."""
    old_value: Tensor | None = None
    """The same at the start of the rollout batch."""
    returns: Tensor | None = None
    """What the critic should say."""
    teacher: Tensor | None = None
    """Log-probs of the policy that is imitated."""

    @property
    def length(self) -> int:
        return self.logp.numel()


# --- advantages --------------------------------------------------------------------------------------------------


def advantages(
    rewards: Sequence[float], groups: Sequence[int], kind: str, ddof: int = 0, eps: float = 0.0
) -> list[float]:
    """Group-relative advantages by their definitions."""
    members = {g: [r for r, h in zip(rewards, groups, strict=True) if h == g] for g in set(groups)}
    centered = [r - sum(members[g]) / len(members[g]) for r, g in zip(rewards, groups, strict=True)]
    flat = [len(set(members[g])) == 1 for g in groups]
    out = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        peers = members[group]
        if len(set(rewards)) == 1 if kind == "batch" else flat[i]:
            out.append(0.0)
        elif kind == "mean":
            out.append(centered[i])
        elif kind == "rloo":
            out.append(reward - (sum(peers) - reward) / (len(peers) - 1))
        elif kind == "batch":
            mean = sum(rewards) / len(rewards)
            std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - ddof))
            out.append((reward - mean) / (std + eps))
        elif kind == "maxrl":
            out.append(reward / (sum(peers) / len(peers)) - 1)
        elif kind == "std":
            mean = sum(peers) / len(peers)
            out.append(centered[i] / (math.sqrt(sum((r - mean) ** 2 for r in peers) / (len(peers) - ddof)) + eps))
        else:
            mean = sum(centered) / len(centered)
            std = math.sqrt(sum((c - mean) ** 2 for c in centered) / (len(centered) - ddof))
            out.append((centered[i] - mean) / (std + eps))
    return out


def generalized(
    rewards: Sequence[float], values: Sequence[float], discount: float, decay: float
) -> tuple[list[float], list[float]]:
    """(advantages, returns) of one response by equation 16 of 1506.02438: the sum over all later TD errors."""
    count, after = len(rewards), [*values[1:], 0.0]
    errors = [rewards[t] + discount * after[t] - values[t] for t in range(count)]
    found = [sum((discount * decay) ** (k - t) * errors[k] for k in range(t, count)) for t in range(count)]
    return found, [a + v for a, v in zip(found, values, strict=True)]


def over_their_std(advantages: Sequence[Sequence[float]], ddof: int = 0, eps: float = 0.0) -> list[list[float]]:
    """(A - mean) / std over the tokens of all responses; 0 where all are equal."""
    every = [a for row in advantages for a in row]
    if len(set(every)) < 2:
        return [[0.0] * len(row) for row in advantages]
    mean = sum(every) / len(every)
    std = math.sqrt(sum((a - mean) ** 2 for a in every) / (len(every) - ddof))
    return [[(a - mean) / (std + eps) for a in row] for row in advantages]


# --- pieces ------------------------------------------------------------------------------------------------------


def clip(w: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    """min(w A, clip(w, 1 - low, 1 + high) A)."""
    return torch.minimum(w * a, torch.clamp(w, 1 - low, 1 + high) * a)


def sequence_ratio(answer: Response) -> Tensor:
    """s = (pi(y) / pi_old(y))^(1/|y|), with its gradient through the mean."""
    total = torch.zeros((), dtype=torch.float64)
    for t in range(answer.length):
        total = total + (answer.logp[t] - answer.old[t])
    return torch.exp(total / answer.length)


def token_ratios(answer: Response) -> list[Tensor]:
    return [torch.exp(answer.logp[t] - answer.old[t]) for t in range(answer.length)]


def sequence_mean(answers: Sequence[Response], value: Callable[[Response], Tensor]) -> Tensor:
    """(1/N) sum_i value_i over sequences that have a trained token."""
    total = torch.zeros((), dtype=torch.float64)
    counted = [answer for answer in answers if answer.length]
    for answer in counted:
        total = total + value(answer)
    return total / max(len(counted), 1)


def token_terms(answer: Response, term: Callable[[Response, int], Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for t in range(answer.length):
        total = total + term(answer, t)
    return total


def token_mean(answers: Sequence[Response], term: Callable[[Response, int], Tensor]) -> Tensor:
    """Sum over all tokens / number of all tokens."""
    return sum((token_terms(a, term) for a in answers), torch.zeros((), dtype=torch.float64)) / max(
        sum(a.length for a in answers), 1
    )


# --- objectives, maximised ---------------------------------------------------------------------------------------


def gspo(answers: Sequence[Response], low: float = 3e-4, high: float = 4e-4) -> Tensor:
    """Equation 5 with the advantage of the first token: one advantage a sequence."""
    return sequence_mean(answers, lambda a: clip(sequence_ratio(a), a.advantage[0], low, high))


def gspo_token(answers: Sequence[Response], low: float = 3e-4, high: float = 4e-4) -> Tensor:
    """Equation 13: s_t = sg(s) pi / sg(pi)."""

    def value(a: Response) -> Tensor:
        s = sequence_ratio(a).detach()
        return (
            token_terms(
                a,
                lambda a, t: clip(s * torch.exp(a.logp[t]) / torch.exp(a.logp[t]).detach(), a.advantage[t], low, high),
            )
            / a.length
        )

    return sequence_mean(answers, value)


def sequence_direct_with_token_advantages(answers: Sequence[Response], low: float = 3e-4, high: float = 4e-4) -> Tensor:
    """What GSPO-token is not: the gradient through the mean mixes the advantages of all tokens."""
    return sequence_mean(
        answers, lambda a: token_terms(a, lambda a, t: clip(sequence_ratio(a), a.advantage[t], low, high)) / a.length
    )


def grpo(answers: Sequence[Response], low: float = 0.2, high: float = 0.27) -> Tensor:
    def value(a: Response) -> Tensor:
        return token_terms(a, lambda a, t: clip(token_ratios(a)[t], a.advantage[t], low, high)) / a.length

    return sequence_mean(answers, value)


def dr_grpo(answers: Sequence[Response], length: int, low: float = 0.2, high: float = 0.2) -> Tensor:
    def value(a: Response) -> Tensor:
        return token_terms(a, lambda a, t: clip(token_ratios(a)[t], a.advantage[t], low, high)) / length

    return sequence_mean(answers, value)


def dapo(answers: Sequence[Response], low: float = 0.2, high: float = 0.28) -> Tensor:
    return token_mean(answers, lambda a, t: clip(token_ratios(a)[t], a.advantage[t], low, high))


def cispo(answers: Sequence[Response], cap: float = 5.0) -> Tensor:
    def term(a: Response, t: int) -> Tensor:
        return torch.clamp(token_ratios(a)[t], max=cap).detach() * a.advantage[t] * a.logp[t]

    return token_mean(answers, term)


def sapo(answers: Sequence[Response], tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    def term(a: Response, t: int) -> Tensor:
        tau = tau_positive if a.advantage[t] > 0 else tau_negative
        return 1 / (1 + torch.exp(-tau * (token_ratios(a)[t] - 1))) * 4 / tau * a.advantage[t]

    return sequence_mean(answers, lambda a: token_terms(a, term) / a.length)


def gmpo(answers: Sequence[Response], width: float = 0.4) -> Tensor:
    def value(a: Response) -> Tensor:
        sign = 1.0 if a.advantage[0] > 0 else -1.0
        total = torch.zeros((), dtype=torch.float64)
        for t in range(a.length):
            d = a.logp[t] - a.old[t]
            total = total + sign * torch.minimum(sign * d, sign * torch.clamp(d, -width, width))
        return a.advantage[0] * torch.exp(total / a.length)

    return sequence_mean(answers, value)


def luspo(answers: Sequence[Response], low: float = 2e-3, high: float = 2.5e-3) -> Tensor:
    return sequence_mean(answers, lambda a: a.length * clip(sequence_ratio(a), a.advantage[0], low, high))


def rloo(answers: Sequence[Response], low: float = 0.2, high: float = 0.2) -> Tensor:
    return sequence_mean(
        answers, lambda a: token_terms(a, lambda a, t: clip(token_ratios(a)[t], a.advantage[t], low, high))
    )


def minpro(answers: Sequence[Response], cap: float = 5.0) -> Tensor:
    """MinPRO: sg(min(w_t x min of the w before t, cap)) A log pi, token mean; 1 before the first token."""

    def term(a: Response, t: int) -> Tensor:
        w = [ratio.item() for ratio in token_ratios(a)]
        return min(w[t] * min(w[:t], default=1.0), cap) * a.advantage[t] * a.logp[t]

    return token_mean(answers, term)


def interpolated(answers: Sequence[Response], staleness: Sequence[Sequence[int]]) -> list[Response]:
    """A-3PO: the same answers with the old policy on the line from the sampler to the current policy.

    Versions: the sampler's is v, the old policy's v + d, that in training v + d + 1.
    """
    moved = []
    for answer, ages in zip(answers, staleness, strict=True):
        assert answer.sampler is not None
        old = [
            (1 - (d / (d + 1))) * answer.sampler[t].item() + (d / (d + 1)) * answer.logp[t].item()
            for t, d in enumerate(ages)
        ]
        old = torch.tensor(old, dtype=torch.float64)
        moved.append(replace(answer, old=old))
    return moved


def value_error(answers: Sequence[Response], width: float = 0.2) -> Tensor:
    """Mean over all tokens of 1/2 max((V - R)^2, (V_old + clip(V - V_old) - R)^2)."""

    def term(a: Response, t: int) -> Tensor:
        assert a.value is not None and a.old_value is not None and a.returns is not None
        v, old, target = a.value[t], float(a.old_value[t]), float(a.returns[t])
        moved = float(v.detach()) - old
        if moved > width:
            held = torch.tensor(old + width, dtype=torch.float64)
        elif moved < -width:
            held = torch.tensor(old - width, dtype=torch.float64)
        else:
            held = v
        free, bounded = (v - target) ** 2, (held - target) ** 2
        return (bounded if float(bounded.detach()) > float(free.detach()) else free) / 2

    return token_mean(answers, term)


def ppo(answers: Sequence[Response], low: float = 0.2, high: float = 0.2, coefficient: float = 0.1) -> Tensor:
    """Equation 9 of 1707.06347 without the entropy bonus."""
    return dapo(answers, low, high) - coefficient * value_error(answers)


def distillation(answers: Sequence[Response], low: float = 0.2, high: float = 0.2) -> Tensor:
    """PPO's clip, token mean, with the advantage log p_teacher - log p_old of each token."""

    def term(a: Response, t: int) -> Tensor:
        assert a.teacher is not None
        return clip(token_ratios(a)[t], a.teacher[t] - a.old[t], low, high)

    return token_mean(answers, term)


def minirl(answers: Sequence[Response], low: float = 0.2, high: float = 0.27, cap: float = 5.0) -> Tensor:
    def term(a: Response, t: int) -> Tensor:
        w = token_ratios(a)[t].detach()
        outside = (a.advantage[t] > 0 and w > 1 + high) or (a.advantage[t] < 0 and w < 1 - low)
        k = min(math.exp(a.old[t].item() - a.sampler[t].item()), cap) if a.sampler is not None else 1.0
        return (0.0 if outside else 1.0) * w * k * a.advantage[t] * a.logp[t]

    return sequence_mean(answers, lambda a: token_terms(a, term))


def dppo_tv(answers: Sequence[Response], low: float = 0.2, high: float = 0.2, cap: float = 20.0) -> Tensor:
    """DPPO with the binary total-variation mask, token mean."""

    def term(a: Response, t: int) -> Tensor:
        moved = math.exp(a.logp[t].item()) - math.exp(a.old[t].item())
        outside = (a.advantage[t] > 0 and moved > high) or (a.advantage[t] < 0 and moved < -low)
        weight = min(token_ratios(a)[t].item(), cap)
        return (0.0 if outside else weight) * a.advantage[t] * a.logp[t]

    return token_mean(answers, term)


OBJECTIVES: dict[str, Callable[[Sequence[Response]], Tensor]] = {
    "gspo": gspo,
    "gspo_token": gspo_token,
    "grpo": grpo,
    "grpo_replay": grpo,
    "dr_grpo": lambda answers: dr_grpo(answers, length=16),
    "dapo": dapo,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "luspo": luspo,
    "rloo": rloo,
    "reinforce_pp": lambda answers: dapo(answers, 0.2, 0.2),
    "reinforce_pp_baseline": lambda answers: dapo(answers, 0.2, 0.2),
    "minpro": minpro,
    "minirl": minirl,
    "ppo": ppo,
    # Of advantages that are given; `distillation` makes them.
    "distillation": lambda answers: dapo(answers, 0.2, 0.2),
}
"""One a preset; `dr_grpo` divides by 16."""


def gradients(
    objective: Callable[[Sequence[Response]], Tensor], answers: Sequence[Response]
) -> tuple[float, list[Tensor]]:
    """(J, dJ/dlogp of each answer)."""
    leaves = [answer.logp.detach().double().requires_grad_() for answer in answers]
    moved = [replace(a, logp=leaf) for leaf, a in zip(leaves, answers, strict=True)]
    value = objective(moved)
    used = [leaf for leaf in leaves if leaf.numel()]
    found = torch.autograd.grad(value, used, allow_unused=True) if value.requires_grad else ()
    # An unused leaf has no gradient, whatever the annotation says.
    grads: dict[int, Tensor | None] = {id(leaf): grad for leaf, grad in zip(used, found, strict=False)}
    return float(value), [leaf * 0 if (grad := grads.get(id(leaf))) is None else grad for leaf in leaves]


# --- the mismatch between sampler and trainer ----------------------------------------------------------------------


def correction(name: str, answer: Response, **bounds: float) -> list[float]:
    """The factor of each token by its definition."""
    assert answer.sampler is not None
    gaps = [answer.old[t].item() - answer.sampler[t].item() for t in range(answer.length)]
    k = [math.exp(gap) for gap in gaps]
    if name == "tis":
        return [min(x, bounds["cap"]) for x in k]
    if name in ("mis", "icepop"):
        return [x if bounds["low"] <= x <= bounds["high"] else 0.0 for x in k]
    if name == "geometric_mask":
        kept = bounds["low"] <= math.exp(sum(gaps) / len(gaps)) <= bounds["high"]
        return [1.0 if kept else 0.0] * answer.length
    if name == "sequence_product":
        return [min(math.exp(sum(gaps)), bounds["cap"])] * answer.length
    if name == "trust_region_mask":
        moves = [answer.logp[t].item() - answer.sampler[t].item() for t in range(answer.length)]
        return [0.0 if max(m * m / 2 for m in moves) > bounds["region"] else 1.0] * answer.length
    if name == "veto":
        return [0.0 if any(x < bounds["below"] for x in k) else 1.0] * answer.length
    drift = sum(answer.sampler[t].item() - answer.logp[t].item() for t in range(answer.length)) / answer.length
    return [0.0 if answer.advantage[t] < 0 and drift > bounds["delta"] else 1.0 for t in range(answer.length)]


# --- the parts of the model that the objective meets ----------------------------------------------------------------


def sampled_logprob(logits: Sequence[float], action: int, temperature: float = 1.0) -> float:
    """log softmax(logits / temperature)[action]."""
    scaled = [z / temperature for z in logits]
    return scaled[action] - math.log(sum(math.exp(z) for z in scaled))


def expert_gates(logits: Sequence[float], experts: Sequence[int], renormalize: bool = True) -> list[float]:
    """Gate of each expert of a set: softmax over all experts, divided by the set's sum when renormalised."""
    total = sum(math.exp(z) for z in logits)
    gates = [math.exp(logits[e]) / total for e in experts]
    return [g / sum(gates) for g in gates] if renormalize else gates
