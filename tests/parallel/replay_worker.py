"""One rank of the replay tests: routes recorded under one set of weights, replayed under another, in every layout."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.data.packing import collate
from gspo_megatron.models import load_recipe
from gspo_megatron.policy import mesh
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.policy import OptimizerSettings, Policy, Scored
from gspo_megatron.policy.replay import Routes, from_stored
from gspo_megatron.policy.weights import random_pieces
from tests.parallel.policy_batch import SLOTS, make_samples, packs_of, reported_routes

RECORDED, CHANGED = 3, 4
"""Seeds of the weights that routes are recorded under, and of those they are replayed under."""
TOKENS = 48
"""Divides the loss."""


def main() -> None:
    """Run every case of cases.json in one world; CASE.pt (rank 0) and CASE-routes-RANK.pt come out."""
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    device = mesh.start_world()
    for name, overrides in json.loads((directory / "cases.json").read_text()).items():
        run_case(name, overrides, directory, device)
    dist.barrier()


def run_case(name: str, overrides: list[str], directory: Path, device: torch.device) -> None:
    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), ["model.architecture.initializer_range=0.1", *overrides])
    arch = recipe.arch
    policy = Policy(recipe, device)
    policy.load(random_pieces(arch, RECORDED))
    samples, layout = make_samples(arch.vocab_size), policy.layout
    packs = [(SLOTS[i : i + layout.data][policy.at.data], layout.context) for i in range(0, len(SLOTS), layout.data)]
    packs = packs_of(layout, policy.at) if layout.dynamic else packs
    batches = policy.place([collate([samples[i] for i in m], layout.padding_of(n), n) for m, n in packs])
    policy.start_optimizer(OptimizerSettings(0.0, (0.9, 0.95), 1e-8, 0.0, 1e9))
    scored = policy.score(batches, records=True)
    routes = policy.routing.recorded(len(batches))
    moved, _ = differentiate(policy, batches, routes, scored)
    unchanged = float(sum(part.sum() for part in policy.routing.changes()))
    # One alone, as probes are scored: an interleaved schedule needs more.
    moved += sum(float((now.logprobs != scored[0].logprobs).sum()) for now in policy.score(batches[:1]))
    policy.load(random_pieces(arch, CHANGED))
    _, replayed = differentiate(policy, batches, routes, scored)
    missed = float(sum(part.sum() for part in policy.routing.changes()))
    _, free = differentiate(policy, batches, None, scored)
    counts = torch.tensor([moved, unchanged, missed, float(sum(entry.num_bytes for entry in routes))])
    dist.all_reduce(counts)
    result = {"counts": counts, "replayed": replayed, "free": free}
    torch.save(describe(policy, batches, routes, packs), directory / f"{name}-routes-{dist.get_rank()}.pt")
    reported = [replace(sample, routes=reported_routes(arch, sample)) for sample in samples]
    batches = policy.place([collate([reported[i] for i in m], layout.padding_of(n), n) for m, n in packs])
    given = policy.routing.reported(batches, arch.num_experts_per_tok)
    scored = policy.score(batches, routes=given, records=True)
    routes = policy.routing.recorded(len(batches))
    _, twice = differentiate(policy, batches, routes, scored)
    _, at_once = differentiate(policy, batches, given, scored)
    if dist.get_rank() == 0:
        torch.save(result | {"twice": twice, "at once": at_once}, directory / f"{name}.pt")
    torch.save(describe(policy, batches, routes, packs), directory / f"{name}-reported-{dist.get_rank()}.pt")


def differentiate(
    policy: Policy, batches: list[MicroBatch], routes: list[Routes] | None, scored: list[Scored]
) -> tuple[float, dict[str, Tensor]]:
    """Positions whose log-prob is not the scored one, and the gradients."""
    moved = [0.0]

    def loss(batch: MicroBatch, now: Scored, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        moved.append(float((now.logprobs.detach() != scored[index].logprobs).sum()))
        return -torch.where(batch.loss_mask, now.logprobs, 0.0).sum() / TOKENS, {}

    policy.train(batches, loss, 0.0, routes=routes, replays=routes is not None)
    gradients = {name: g.clone() for name, g in policy.weights.export(2**20, gradient_of)}
    return sum(moved), gradients


def gradient_of(parameter: Any) -> Tensor:
    """What Megatron's wrapper accumulates and reduces."""
    return parameter.main_grad


def describe(
    policy: Policy, batches: list[MicroBatch], routes: list[Routes], packs: list[tuple[list[int], int]]
) -> list[dict]:
    """The routes with their place in the packs, to be put together again by the test."""
    return [
        {
            "layers": policy.routing.layers,
            "members": members,
            "rows": batch.indices.chunk(policy.layout.tensor)[policy.at.tensor],
            "chosen": [from_stored(part) for part in entry.chosen],
            "multiple": policy.layout.padding_of(ranks),
        }
        for batch, entry, (members, ranks) in zip(batches, routes, packs, strict=True)
    ]


if __name__ == "__main__":
    main()
