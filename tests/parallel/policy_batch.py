"""The batch of the policy tests, the same in every rank and in the oracle."""

from __future__ import annotations

import numpy as np
import torch

from gspo_megatron.config.model_section import Architecture
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


def share_slots(ranks: int, group: int) -> list[list[list[int]]]:
    """[slot][data-parallel rank] -> members. An empty micro-batch stands beside full ones, more fill the last group.

    Args:
        group: slots come in multiples of this (the stages, where the schedule is interleaved).
    """
    bins: list[list[int]] = [SLOTS[0], [], *SLOTS[1:]]
    bins += [[] for _ in range(-len(bins) % (ranks * group))]
    return [bins[start : start + ranks] for start in range(0, len(bins), ranks)]


def reported_routes(arch: Architecture, sample: Sample) -> np.ndarray:
    """[length, layers, k] int16 experts as a sampler reports them: none for the second token and for the last one."""
    generator = np.random.default_rng(len(sample.token_ids))
    shape = (len(sample.token_ids), arch.num_hidden_layers, arch.num_experts)
    routes = generator.random(shape).argsort(-1)[..., : arch.num_experts_per_tok].astype(np.int16)
    routes[[1, -1]] = -1
    return routes
