"""The reference core attention, block by block, against the matrix written down whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.policy import attention
from gspo_megatron.policy.attention import PackedBatchParams, ReferenceAttention, plan_buckets, zigzag_indices

HEADS, GROUPS, WIDTH = 4, 2, 8
LENGTHS = [8, 20, 4, 64, 40, 36, 100]
"""Multiples of 4, so that two context-parallel ranks can share them."""


def core_attention() -> ReferenceAttention:
    """Of one rank to which the keys and values of all have come already."""
    module: Any = object.__new__(ReferenceAttention)
    torch.nn.Module.__init__(module)
    module.context_group = type("Alone", (), {"size": lambda self: 1})()
    module.scale = WIDTH**-0.5
    return module


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], ranks: int) -> Tensor:
    """What all ranks compute, put back in the order of the pack."""
    cu_seqlens = starts(lengths)
    held = [zigzag_indices(cu_seqlens, rank, ranks) for rank in range(ranks)]
    gathered = torch.cat(held)
    parts = []
    for rank in range(ranks):
        buckets = plan_buckets(cu_seqlens, rank, ranks, torch.device("cpu"))
        params = PackedBatchParams(qkv_format="thd", buckets=buckets)
        parts.append(
            core_attention()(query[held[rank]], key[gathered], value[gathered], None, packed_seq_params=params)
        )
    return torch.cat(parts)[gathered.argsort()]


def written_down(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    parts = []
    for start, length in zip(starts(lengths).tolist(), lengths, strict=False):
        q, k, v = (part[start : start + length].transpose(0, 1) for part in (query, key, value))
        k, v = (part.repeat_interleave(HEADS // GROUPS, 0) for part in (k, v))
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(1, 2) * WIDTH**-0.5).masked_fill(hidden, float("-inf"))
        parts.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(parts)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("budget", [1, 2**10, 2**20], ids=["a query a block", "some blocks", "one block"])
def test_blocks_give_what_the_whole_matrix_gives(ranks: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORE_BUDGET", budget)
    tensors = inputs(sum(LENGTHS))
    results = [attend(*tensors, LENGTHS, ranks), written_down(*tensors, LENGTHS)]
    weight = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [torch.autograd.grad((result * weight).sum(), tensors) for result in results]
    for ours, wanted in zip((results[0], *grads[0]), (results[1], *grads[1]), strict=True):
        assert float((ours - wanted).detach().abs().max()) < 1e-13


@pytest.mark.parametrize("ranks", [1, 2])
def test_narrow_gradients_add_up_in_float32(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key gets a part of its gradient from each block of queries: in bfloat16 many blocks are as near as one.

    With sums in bfloat16 they are 1.4 to 2.8 times as far from float64 (seen by leaving out their type).
    """
    query, key, value = narrow = [part.detach().bfloat16().requires_grad_() for part in inputs(sum(LENGTHS))]
    wide_query, wide_key, wide_value = wide = [part.detach().double().requires_grad_() for part in narrow]
    weight = torch.randn(sum(LENGTHS), HEADS * WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = torch.autograd.grad(
        (written_down(wide_query, wide_key, wide_value, LENGTHS) * weight.double()).sum(), wide
    )
    off = []
    for budget in (2**20, 2**10):
        monkeypatch.setattr(attention, "SCORE_BUDGET", budget)
        found = torch.autograd.grad((attend(query, key, value, LENGTHS, ranks) * weight).sum(), narrow)
        off.append(
            [float((ours.double() - grad).norm() / grad.norm()) for ours, grad in zip(found, wanted, strict=True)]
        )
    for one_block, many in zip(*off, strict=True):
        assert many < 1.2 * one_block


def test_both_passes_are_the_same_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORE_BUDGET", 2**10)
    query, key, value = (part.detach().float().requires_grad_() for part in inputs(sum(LENGTHS)))
    with torch.no_grad():
        scored = attend(query, key, value, LENGTHS, 2)
    assert torch.equal(scored, attend(query, key, value, LENGTHS, 2))


def test_memory_is_linear_in_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for the backward pass, and the largest block of weights in either pass."""
    monkeypatch.setattr(attention, "SCORE_BUDGET", 2**14)
    largest, weigh = [], attention._weights

    def weighed(*arguments: Any) -> Tensor:
        made = weigh(*arguments)
        largest.append(made.numel())
        return made

    monkeypatch.setattr(attention, "_weights", weighed)
    kept = {}
    for tokens in (512, 2048):
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda part, sizes=sizes: (sizes.update({part.data_ptr(): part.nbytes}), part)[1], lambda part: part
        ):
            attend(*inputs(tokens), [tokens], 2).sum().backward()
        kept[tokens] = sum(sizes.values())
    assert kept[2048] <= 4.1 * kept[512]
    assert max(largest) <= 2**14
