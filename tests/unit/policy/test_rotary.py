"""The rotation of a whole pack against megatron's own, which goes sequence by sequence: equal to the bit."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.policy.attention import positions_of, zigzag_indices
from gspo_megatron.policy.rotary import rotate, rotations

CASES = settings(max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10, deadline=None, print_blob=True)
HEADS, WIDTH = 3, 16
LONGEST = 64


def megatron_rotates(tokens: torch.Tensor, starts: torch.Tensor, angles: torch.Tensor, **place: Any) -> torch.Tensor:
    """Rank `rank` of `size`; queries and keys are scaled by YaRN's `factor`."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    rank, size, factor = place["rank"], place["size"], place["factor"]
    group: Any = type("Group", (), {"size": lambda self: size, "rank": lambda self: rank})()
    return _apply_rotary_pos_emb_thd(tokens, starts, angles, mscale=factor, cp_group=group)


@CASES
@given(
    chunks=st.lists(st.integers(0, 8), min_size=1, max_size=6).filter(any),
    size=st.sampled_from([1, 2, 4]),
    at=st.integers(0, 3),
    factor=st.sampled_from([1.0, 1.1386294361119891]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_one_call_gives_the_bits_of_a_loop(
    chunks: list[int], size: int, at: int, factor: float, dtype: torch.dtype
) -> None:
    rank, starts = at % size, torch.tensor([0, *(2 * size * part for part in chunks)]).cumsum(0).to(torch.int32)
    held = zigzag_indices(starts, rank, size)
    generator = torch.Generator().manual_seed(len(held))
    tokens = torch.randn(len(held), HEADS, WIDTH, generator=generator).to(dtype)
    frequencies = 1e4 ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    angles = torch.outer(torch.arange(LONGEST + 1.0), frequencies).repeat(1, 2)[:, None, None]
    ours = rotate(tokens[:, None], rotations(angles, positions_of(starts, held), factor, dtype))[:, 0]
    assert torch.equal(ours, megatron_rotates(tokens, starts, angles, rank=rank, size=size, factor=factor))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_positions_start_anew_with_every_sequence(size: int) -> None:
    starts = torch.tensor([0, 0, 8, 8, 24, 24], dtype=torch.int32)
    every = torch.cat([torch.arange(0), torch.arange(8), torch.arange(16)])
    for rank in range(size):
        held = zigzag_indices(starts, rank, size)
        assert torch.equal(positions_of(starts, held), every[held])


def test_no_padding_lies_between_sequences() -> None:
    from gspo_megatron.data.packing import collate
    from gspo_megatron.policy.mesh import ContextShare
    from gspo_megatron.policy.microbatch import place
    from tests.parallel.policy_batch import make_samples

    placed = place(collate(make_samples(96), 4), ContextShare(2, 1), torch.device("cpu"))
    assert placed.params.pad_between_seqs is False
