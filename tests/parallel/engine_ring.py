"""Transformer Engine's context-parallel attention: the kernel, and what goes on around it, answered by torch.

A rank's keys and values travel around a ring, and what each step gives is merged by its softmax normalizer; or they
are gathered; or the ranks exchange heads. Packs only. Every sequence of a pack is split over the ranks, its first and
second half apart.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.policy import cpu_shims
from tests.parallel import engine_answers
from tests.parallel.engine_answers import engine, spans

CUDNN = (9, 20, 0)


def scores(queries: Tensor, keys: Tensor, scale: float, mask: str) -> Tensor:
    """[heads, q, k] of one sequence; with `bottom_right` the last query sees the last key, however many there are."""
    found = torch.einsum("qhd,khd->hqk", queries.double(), spread(keys, queries)) * scale
    if "causal" in mask:
        seen = 1 + (len(keys) - len(queries) if "bottom_right" in mask else 0)
        found = found.masked_fill(torch.ones(found.shape[1:], dtype=torch.bool).triu(seen), float("-inf"))
    return found


def spread(keys: Tensor, queries: Tensor) -> Tensor:
    """Keys or values for each head of the queries."""
    return keys.double().repeat_interleave(queries.shape[1] // keys.shape[1], 1)


def gathered(gradient: Tensor, groups: int) -> Tensor:
    """[k, groups, d] sums over the heads that share a key."""
    return gradient.unflatten(1, (groups, -1)).sum(2)


def pairs(cu_q: Tensor, at_q: Tensor, cu_k: Tensor, at_k: Tensor) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Rows of queries and of keys of each sequence: lengths from one list, places in the pack from the padded one."""
    found = []
    for (a, b), (c, d), at, beside in zip(spans(cu_q), spans(cu_k), at_q.tolist(), at_k.tolist(), strict=False):
        if a < b and c < d:
            found.append(((at, at + b - a), (beside, beside + d - c)))
    return found


def fused_attn_fwd(
    _trains: bool, _most_q: int, _most_k: int, cu_q: Tensor, cu_k: Tensor, q: Tensor, k: Tensor, v: Tensor,
    *_: Any, attn_scale: float, attn_mask_type: str, cu_seqlens_q_padded: Tensor, cu_seqlens_kv_padded: Tensor,
    **__: Any,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Attention of packs [T, heads, d], and the normalizer [T, heads, 1] of each token and head."""
    out = torch.zeros_like(q)
    normalizers = torch.full((*q.shape[:2], 1), float("-inf"), dtype=torch.float32)
    for (first, end), (begin, stop) in pairs(cu_q, cu_seqlens_q_padded, cu_k, cu_seqlens_kv_padded):
        found = scores(q[first:end], k[begin:stop], attn_scale, attn_mask_type)
        total = found.logsumexp(-1)
        shares = (found - total[..., None]).exp()
        out[first:end] = torch.einsum("hqk,khd->qhd", shares, spread(v[begin:stop], q)).to(out.dtype)
        normalizers[first:end, :, 0] = total.T.float()
    return out, [normalizers, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    _most_q: int, _most_k: int, cu_q: Tensor, cu_k: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, grad: Tensor,
    _dtype: Any, kept: list[Tensor], _backend: Any, *, attn_scale: float, attn_mask_type: str,
    cu_seqlens_q_padded: Tensor, cu_seqlens_kv_padded: Tensor, **_: Any,
) -> list[Tensor | None]:  # fmt: skip
    """Its gradients, given the normalizers of all steps."""
    o, grad, normalizers, groups = o.view(q.shape), grad.view(q.shape), kept[0], k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for (first, end), (begin, stop) in pairs(cu_q, cu_seqlens_q_padded, cu_k, cu_seqlens_kv_padded):
        rows, columns = slice(first, end), slice(begin, stop)
        found = scores(q[rows], k[columns], attn_scale, attn_mask_type)
        shares = (found - normalizers[rows, :, 0].double().T[..., None]).exp()
        upper = grad[rows].double()
        inner = torch.einsum("qhd,khd->hqk", upper, spread(v[columns], q))
        inner = shares * (inner - (upper * o[rows].double()).sum(-1).T[..., None]) * attn_scale
        dq[rows] = torch.einsum("hqk,khd->qhd", inner, spread(k[columns], q)).to(dq.dtype)
        dk[columns] = gathered(torch.einsum("hqk,qhd->khd", inner, q[rows].double()), groups).to(dk.dtype)
        dv[columns] = gathered(torch.einsum("hqk,qhd->khd", shares, upper), groups).to(dv.dtype)
    return [dq, dk, dv, None]


def half(lengths: Tensor, which: int) -> Tensor:
    """Rows of the first (0) or second (1) half of every sequence."""
    middle = [(begin + (end - begin) // 2 * which, (end - begin) // 2) for begin, end in spans(lengths)]
    return torch.cat([torch.arange(begin, begin + size) for begin, size in middle])


def thd_read_half_tensor(tokens: Tensor, lengths: Tensor, which: int) -> Tensor:
    """That half of [.., T, heads, d]."""
    return tokens.index_select(tokens.dim() - 3, half(lengths, which))


def thd_second_half_lse_correction(total: Tensor, step: Tensor, lengths: Tensor, packed: bool) -> None:
    """Add a step's normalizers [heads, T/2] to those of the second halves."""
    assert packed
    rows = half(lengths, 1)
    total[:, rows] = torch.logaddexp(total[:, rows], step)


def thd_out_correction(
    out: Tensor, step: Tensor, old: Tensor, new: Tensor, part: Tensor, lengths: Tensor, second: bool, _packed: bool
) -> None:
    """Merge a step's result; the weights are the ratios of normalizers."""
    whole = out.view(-1, *step.shape[-2:])
    rows = half(lengths, 1) if second else torch.arange(len(whole))
    before, now = (old[:, rows] - new[:, rows]).exp().T[..., None], (part - new[:, rows]).exp().T[..., None]
    whole[rows] = (whole[rows] * before + step.view(-1, *whole.shape[1:]) * now).to(out.dtype)


def thd_read_second_half_lse(total: Tensor, lengths: Tensor, _packed: bool, _count: int) -> Tensor:
    """Normalizers of the second halves."""
    return total[:, half(lengths, 1)].contiguous()


def thd_grad_correction(grad: Tensor, step: Tensor, lengths: Tensor, first: str, second: str) -> None:
    """Add, copy or zero the gradient of the halves; `none` leaves one, and then the step has the other only."""
    dim = grad.dim() - 3
    whole = not {"none", "zero"} & {first, second}
    for which, action in enumerate((first, second)):
        rows = half(lengths, which)
        if action == "zero":
            grad.index_fill_(dim, rows, 0)
        elif action != "none":
            part = step.index_select(dim, rows) if whole else step
            part = part.view(grad.index_select(dim, rows).shape)
            grad.index_add_(dim, rows, part) if action == "add" else grad.index_copy_(dim, rows, part)


def rank_order(lengths: Tensor, ranks: int) -> Tensor:
    """Where in the pack each token is, with those of one rank behind those of the other."""
    found = []
    for rank in range(ranks):
        for begin, end in spans(lengths):
            size = (end - begin) // (2 * ranks)
            found += [torch.arange(begin + at * size, begin + (at + 1) * size) for at in (rank, 2 * ranks - 1 - rank)]
    return torch.cat(found)


def thd_cp_rank_order_to_sequence_order(tokens: Tensor, lengths: Tensor, ranks: int, count: int) -> Tensor:
    """The tokens of all ranks in the order of the pack."""
    assert count == len(tokens)
    return torch.empty_like(tokens).index_copy_(0, rank_order(lengths, ranks), tokens)


def thd_sequence_order_to_cp_rank_order(tokens: Tensor, lengths: Tensor, ranks: int, count: int) -> Tensor:
    """Back."""
    assert count == len(tokens)
    return tokens.index_select(0, rank_order(lengths, ranks))


def thd_copy_valid_tokens_from_per_split_to_rank_local(
    whole: Tensor, part: Tensor, places_of: Tensor, lengths: Tensor
) -> None:
    """Copy the tokens that one call of the kernel computed."""
    for (begin, end), at in zip(spans(lengths), places_of.tolist(), strict=False):
        whole[at : at + end - begin] = part[at : at + end - begin]


def exchange(
    _rank: int, sent: Tensor, _to: int, received: Tensor, source: int, group: Any, _batched: bool
) -> list[Any]:
    """One hop of the ring, finished at once: gloo would need a thread to progress."""
    parts = [torch.empty_like(received.contiguous()) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, sent.contiguous().clone(), group=group)
    received.copy_(parts[dist.get_group_rank(group, source)])
    return []


def install() -> None:
    """After `engine_answers.install`: context-parallel attention takes cuDNN's path, answered here."""
    packed = "attention.dot_product_attention"
    backends, ring, utils = (engine(f"{packed}.{name}") for name in ("backends", "context_parallel", "utils"))
    corrections = (
        thd_read_half_tensor, thd_second_half_lse_correction, thd_out_correction, thd_read_second_half_lse,
        thd_grad_correction, thd_cp_rank_order_to_sequence_order, thd_sequence_order_to_cp_rank_order,
        thd_copy_valid_tokens_from_per_split_to_rank_local,
    )  # fmt: skip
    engine_answers.answer({function.__name__: function for function in corrections})
    for function in (fused_attn_fwd, fused_attn_bwd):
        setattr(ring, function.__name__, engine_answers.counted(function.__name__, function))
    ring.flash_attn_p2p_communicate = exchange
    ring.get_device_compute_capability = lambda: engine_answers.CAPABILITY
    for module in (ring, utils, backends):
        module.get_cudnn_version = lambda: CUDNN
    # cuDNN's kernel takes 16 bits; the one that answers here takes float32 in their place.
    backends.torch = cpu_shims._Module(torch, float16=torch.float32)
    usual = utils.get_attention_backend

    def choose(parameters: Any, *rest: Any, **named: Any) -> Any:
        if not parameters.context_parallel:
            return usual(parameters, *rest, **named)
        assert parameters.pad_between_seqs is not None
        backend = int(engine("cpp_extensions.fused_attn").FusedAttnBackend["F16_arbitrary_seqlen"])
        return False, None, True, backend, False, [False, True, False]

    utils.get_attention_backend = choose
