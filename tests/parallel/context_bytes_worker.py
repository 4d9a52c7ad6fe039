"""One rank: bytes of keys and values that context-parallel ranks exchange, counted where they are received."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.models import load_recipe
from gspo_megatron.plan.estimate.attention_time import exchanged_bytes
from gspo_megatron.policy import mesh
from gspo_megatron.policy.policy import Policy
from gspo_megatron.policy.weights import random_pieces
from gspo_megatron.trainer.batches import Batcher
from gspo_megatron.types import Sample, SampleRef

SEQUENCES, MEDIAN, SPREAD, LONGEST = 64, 22, 1.0, 240
"""The lengths `math` of tools/bench_packing.py in small: lognormal, the longest 11 times the median."""


def main() -> None:
    """Run every case of cases.json in one world; results.json (rank 0) has sums over all ranks."""
    directory = Path(sys.argv[1])
    device = mesh.start_world()
    cases = json.loads((directory / "cases.json").read_text())
    results = {name: run_case(overrides, device) for name, overrides in cases.items()}
    if dist.get_rank() == 0:
        (directory / "results.json").write_text(json.dumps(results))
    dist.barrier()


def run_case(overrides: list[str], device: torch.device) -> dict[str, Any]:
    """Bytes that were received, bytes by the formula of the plan, and how many ranks share a pack."""
    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), overrides)
    policy = Policy(recipe, device)
    policy.load(random_pieces(recipe.arch, 3))
    # These samples are at hand: no store is read.
    batches = Batcher(recipe, policy, None).place_samples(make_samples(recipe.arch.vocab_size))  # type: ignore[arg-type]
    with counted(policy) as received:
        scored = policy.score(batches)
    scored_sum = sum(float((one.logprobs * batch.loss_mask).sum()) for one, batch in zip(scored, batches, strict=True))
    layers = recipe.arch.num_hidden_layers
    formula = sum(
        layers
        * len(batch.token_ids)
        * sum(exchanged_bytes(recipe.arch, replace(policy.layout, context=batch.share.size), 4))
        for batch in batches
    )
    sums = torch.tensor([received[0], formula, scored_sum / policy.layout.tensor], dtype=torch.float64)
    dist.all_reduce(sums)
    counted_bytes, formula, scored_sum = sums.tolist()
    sizes = sorted({batch.share.size for batch in batches if bool(batch.loss_mask.any())})
    return {"received": counted_bytes, "formula": formula, "logprobs": scored_sum, "sizes": sizes}


@contextmanager
def counted(policy: Policy) -> Iterator[list[int]]:
    """Count what gathers and exchanges over the ranks of packs bring to this rank."""
    from megatron.core.tensor_parallel import mappings

    shares = policy._shares.values()
    groups = {id(group) for share in shares for group in (share.head_group, share.key_group) if group is not None}
    received, gather, exchange = [0], mappings.dist_all_gather_func, dist.all_to_all_single

    def count(output: torch.Tensor, part: torch.Tensor, *rest: Any, group: Any = None, **named: Any) -> Any:
        # Expert-parallel ranks may be the same ones; they gather whole numbers: how many tokens each expert gets.
        if id(group) in groups and part.is_floating_point():
            received[0] += output.nbytes - part.nbytes
        return gather(output, part, *rest, group=group, **named)

    def count_exchange(output: torch.Tensor, part: torch.Tensor, *rest: Any, group: Any = None, **named: Any) -> Any:
        # What a rank sends to itself is not received. Expert-parallel ranks exchange rows without heads.
        if id(group) in groups and part.dim() == 3:
            received[0] += output.nbytes * (group.size() - 1) // group.size()
        return exchange(output, part, *rest, group=group, **named)

    mappings.dist_all_gather_func, dist.all_to_all_single = count, count_exchange
    try:
        yield received
    finally:
        mappings.dist_all_gather_func, dist.all_to_all_single = gather, exchange


def make_samples(vocab_size: int) -> list[Sample]:
    """Long-tailed lengths; all but the first token are trained."""
    generator = np.random.default_rng(5)
    drawn = generator.lognormal(np.log(MEDIAN), SPREAD, SEQUENCES)
    samples = []
    for index, length in enumerate(np.clip(drawn, 4, LONGEST).astype(int).tolist()):
        ref = SampleRef("", index, 0, 1, length - 1, 0.0, "stop", ())
        token_ids = generator.integers(0, vocab_size, length).astype(np.int32)
        samples.append(Sample(token_ids, np.arange(length) > 0, np.zeros(length, np.float32), ref))
    return samples


if __name__ == "__main__":
    main()
