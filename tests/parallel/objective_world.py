"""One rank of the gloo world of test_objective_world.py: every case in every layout, results as JSON.

Run as `python -m tests.parallel.objective_world DIRECTORY RANK WORLD`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.objective import ObjectiveSpec, add_sums, group_advantages, policy_loss
from gspo_megatron.objective.summary import LEFT_OUT
from gspo_megatron.trainer.metric_sums import TOKEN_ENTROPY, reduce_sums, zero_sums
from tests.reference import Response
from tests.unit.objective.cases import (
    FIXTURES,
    PRESET_NAMES,
    WHOLE_ROWS,
    as_answers,
    as_rows,
    loss_inputs,
    preset,
    random_answers,
    totals_of,
)

LAYOUTS = ("data_parallel", "data_parallel_micro", "one_rank_idle", "context_parallel")


@dataclass(frozen=True)
class Case:
    """One batch under one objective."""

    spec: ObjectiveSpec
    answers: Sequence[Response]
    token_advantages: bool = False


def cases() -> dict[str, Case]:
    """The fixtures A, A2, B, Bside, C, H and agg, and drawn batches for every preset and correction."""
    fixture, gspo = FIXTURES, preset("gspo")
    found: dict[str, Case] = {}
    for entry in ("A", "A2"):
        rewards = torch.tensor(fixture[entry]["rewards"], dtype=torch.float64)
        for kind in ("std", "mean", "rloo"):
            advantages = group_advantages(rewards, torch.zeros(4, dtype=torch.int64), kind)
            rows = [[1e-4 * (i + 1)] * (i + 1) for i in range(4)]
            found[f"{entry}/{kind}"] = Case(gspo, as_answers(rows, advantages.tolist()))
    for name in ("gspo", "gspo_token", "grpo"):
        found[f"B/{name}"] = Case(preset(name), as_answers(fixture["B"]["log_ratio"], fixture["B"]["A"]))
    sides = [[d] * 3 for d in fixture["Bside"]["log_ratio_each"]]
    found["Bside"] = Case(gspo, as_answers(sides, [float(a) for a in fixture["Bside"]["A"]]))
    found["C"] = Case(preset("gspo_token"), as_answers(fixture["C"]["log_ratio"], fixture["C"]["A_tok"]), True)
    found["H"] = Case(gspo.replace(trust="none"), as_answers([fixture["H"]["d=logp_theta-logp_old"]], [1.0]))
    flat, losses = [[0.0] * n for n in fixture["agg"]["lens"]], [-x for x in fixture["agg"]["token_loss"]]
    for aggregation in ("seq_mean_token_mean", "token_mean", "seq_mean_token_sum", "constant"):
        spec = preset("grpo").replace(aggregation=aggregation, aggregation_length=8)
        found[f"agg/{aggregation}"] = Case(spec, as_answers(flat, losses))
    for seed, name in enumerate(name for name in PRESET_NAMES if name not in WHOLE_ROWS):
        found[f"drawn/{name}"] = Case(preset(name), random_answers(seed, 5e-4))
    for seed, name in enumerate(("geometric_mask", "sequence_product", "opsm", "trust_region_mask", "veto")):
        bounds = {"geometric_low": 0.8, "geometric_high": 1.2, "trust_region_delta": 0.3, "veto_below": 0.5}
        spec = gspo.replace(correction=name, **bounds)
        found[f"correction/{name}"] = Case(spec, random_answers(seed, 5e-4, longest=8))
    return found


def run_case(case: Case, layout: str, rank: int, world: int) -> dict[str, Any]:
    """Loss, gradients and metrics of one case, reduced over the world."""
    rows = as_rows(case.answers, seed=3)
    context = world if layout == "context_parallel" else 1
    everyone = list(range(len(rows)))
    mine = everyone if context > 1 else everyone[rank::world]
    if layout == "one_rank_idle":
        mine = everyone if rank == 0 else []
    microbatches = [[i] for i in mine] if layout == "data_parallel_micro" else [mine]

    def add(values: Tensor) -> Tensor:
        assert values.shape == (len(mine),), "context ranks exchange numbers a sequence, never tokens"
        dist.all_reduce(values)
        return values

    losses, outputs = [], []
    for indices in microbatches:
        inputs = loss_inputs(
            [rows[i] for i in indices],
            totals_of(rows),
            context,
            rank if context > 1 else 0,
            case.token_advantages or case.spec.has_token_advantages,
        )
        out = policy_loss(case.spec, inputs, add) if context > 1 else policy_loss(case.spec, inputs)
        losses.append(out.loss.double())
        outputs.append(out)
    loss = torch.stack([*losses, torch.zeros((), dtype=torch.float64)]).sum()
    grads = (
        torch.autograd.grad(loss, [row.leaf for row in rows], allow_unused=True)
        if loss.requires_grad
        else [None] * len(rows)
    )
    flat = torch.cat([torch.zeros_like(r.leaf) if g is None else g for r, g in zip(rows, grads, strict=True)])
    value = loss.detach().clone()
    dist.all_reduce(value)
    dist.all_reduce(flat)
    [reduced] = reduce_sums(
        [add_sums([out.metrics for out in outputs]) if outputs else None], objective_zero(case.spec)
    )
    return {
        "value": -value.item(),
        "grads": [(-part).tolist() for part in flat.split([row.leaf.numel() for row in rows])],
        # Where a sequence lies on the edge of two bins depends on the order of its sum.
        "metrics": {name: value.tolist() for name, value in reduced.items() if name != "log_s_histogram"},
    }


def objective_zero(spec: ObjectiveSpec) -> dict[str, Tensor]:
    """The sums of the objective as 0, without those that the trainer adds."""
    every = zero_sums(spec, torch.device("cpu"))
    return {name: entry for name, entry in every.items() if name != TOKEN_ENTROPY and not name.startswith(LEFT_OUT)}


def compare_reductions(rank: int, world: int) -> list[dict[str, list[Any]]]:
    """For each mini-batch and name [reduced once, by the old formula]: every micro-batch's numbers from every rank.

    Mini-batches have several micro-batches; in the last one only rank 0 counts.
    """
    spec = preset("gspo").replace(correction=("tis",), kl="k3", kl_coefficient=0.1)
    mine: list[list[dict[str, Tensor]]] = []
    for minibatch, micro_batches in enumerate((3, 1, 2)):
        counts = micro_batches if minibatch < 2 or rank == 0 else 0
        drawn = [as_rows(random_answers(100 * minibatch + 10 * rank + at, 5e-4)) for at in range(counts)]
        mine.append([policy_loss(spec, loss_inputs(rows, totals_of(rows))).metrics for rows in drawn])
    reduced = reduce_sums([add_sums(parts) if parts else None for parts in mine], objective_zero(spec))
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, [[{n: v.tolist() for n, v in part.items()} for part in parts] for parts in mine])
    old = [add_by_hand([part for ranks in gathered for part in ranks[index]]) for index in range(len(mine))]
    return [
        {name: [new[name].tolist(), by_hand[name]] for name in by_hand}
        for new, by_hand in zip(reduced, old, strict=True)
    ]


def add_by_hand(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers and tables entry by entry: the maximum of names that end in `/max`, the sum of all others."""
    total = dict(parts[0])
    for part in parts[1:]:
        for name, entry in part.items():
            if name.endswith("/max"):
                total[name] = max(total[name], entry)
            elif isinstance(entry, list):
                total[name] = [
                    [a + b for a, b in zip(x, y, strict=True)] for x, y in zip(total[name], entry, strict=True)
                ]
            else:
                total[name] += entry
    return total


def main(directory: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory / 'rendezvous'}", rank=rank, world_size=world)
    results: dict[str, Any] = {
        f"{name}@{layout}": run_case(case, layout, rank, world) for name, case in cases().items() for layout in LAYOUTS
    }
    results["reductions"] = compare_reductions(rank, world)
    if rank == 0:
        (directory / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
