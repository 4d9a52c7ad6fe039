"""The batch of the policy tests, the same in every rank and in the oracle."""

from __future__ import annotations

import numpy as np
import torch

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.parallel import Coordinates, Layout
from gspo_megatron.types import Sample, SampleRef

SEED = 3
CLIP_LOW, CLIP_HIGH = 7e-3, 9e-3
"""A band that some of the sequences leave."""
SEQUENCES = [(9, 4), (31, 20), (5, 2), (17, 8), (12, 0), (7, 6), (22, 1), (14, 7)]
"""(length, trained tokens); one is fully masked, one has a single trained token."""
SLOTS = [[0], [1, 2, 3], [4], [5, 6, 7]]
"""Uneven micro-batches; one holds the fully masked sequence alone, so some ranks have nothing trained."""
PADDED_LENGTH = 32
"""Every sequence takes as many tokens in the padded form of the batch."""


def make_samples(vocab_size: int) -> list[Sample]:
    """The same ragged batch everywhere."""
    return [sample for sample, _ in _draw(vocab_size)]


def make_advantages(vocab_size: int) -> list[float]:
    """The advantage of each sequence of the batch."""
    return [advantage for _, advantage in _draw(vocab_size)]


def _draw(vocab_size: int) -> list[tuple[Sample, float]]:
    generator = np.random.default_rng(SEED)
    samples = []
    for index, (length, trained) in enumerate(SEQUENCES):
        mask = np.zeros(length, dtype=bool)
        mask[length - trained :] = trained > 0
        ref = SampleRef("", index, 0, length - trained, trained, 0.0, "stop", ())
        token_ids = generator.integers(0, vocab_size, length).astype(np.int32)
        sample = Sample(token_ids, mask, np.zeros(length, np.float32), ref)
        samples.append((sample, float(generator.choice([-1.0, 0.5, 1.0]))))
    return samples


def old_logprobs(trained: int, index: int) -> torch.Tensor:
    """[trained] how far the oracle is above its old log-probs: ratios differ from 1 on both sides of the band."""
    generator = torch.Generator().manual_seed(100 + index)
    return 0.02 * torch.randn(trained, generator=generator, dtype=torch.float64)


MIXED = {2: [(2,), (1, 1)], 4: [(2, 1, 1), (4,), (1, 1, 2)]}
"""By CP: how many ranks share each pack of a data-parallel rank, in one micro-batch after the other."""


def packs_of(layout: Layout, at: Coordinates) -> list[tuple[list[int], int]]:
    """(members, context-parallel ranks that share them) of each micro-batch of a rank.

    An empty micro-batch stands beside full ones, more fill the last group: where the schedule is interleaved,
    micro-batches come in multiples of the stages.
    """
    bins: list[list[int]] = (
        [SLOTS[0], [], SLOTS[2], SLOTS[1], SLOTS[3]] if layout.dynamic else [SLOTS[0], [], *SLOTS[1:]]
    )
    group = layout.pipeline if layout.virtual > 1 else 1
    mine: list[tuple[list[int], int]] = []
    turn = 0
    while bins or len(mine) % group:
        for data in range(layout.data):
            sizes = MIXED[layout.context][turn % len(MIXED[layout.context])] if layout.dynamic else (layout.context,)
            start = 0
            for size in sizes:
                members = bins.pop(0) if bins else []
                if data == at.data and start <= at.context < start + size:
                    mine.append((members, size))
                start += size
            turn += 1
    return mine


def reported_routes(arch: Architecture, sample: Sample) -> np.ndarray:
    """[length, layers, k] int16 experts as a sampler reports them: none for the second token and for the last one."""
    generator = np.random.default_rng(len(sample.token_ids))
    shape = (len(sample.token_ids), arch.num_hidden_layers, arch.num_experts)
    routes = generator.random(shape).argsort(-1)[..., : arch.num_experts_per_tok].astype(np.int16)
    routes[[1, -1]] = -1
    return routes
