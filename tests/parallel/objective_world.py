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

from gspo_megatron.objective import ObjectiveSpec, group_advantages, policy_loss
from tests.reference import Response
from tests.unit.objective.cases import (
    FIXTURES,
    PRESET_NAMES,
    as_answers,
    as_rows,
    loss_inputs,
    preset,
    random_answers,
    reduce_metrics,
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
    for seed, name in enumerate(PRESET_NAMES):
        found[f"drawn/{name}"] = Case(preset(name), random_answers(seed, 5e-4))
    for seed, name in enumerate(("geometric_mask", "sequence_product", "opsm", "veto")):
        spec = gspo.replace(correction=name, geometric_low=0.8, geometric_high=1.2, veto_below=0.5)
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
            [rows[i] for i in indices], totals_of(rows), context, rank if context > 1 else 0, case.token_advantages
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
    return {
        "value": -value.item(),
        "grads": [(-part).tolist() for part in flat.split([row.leaf.numel() for row in rows])],
        "metrics": reduce_over_world(reduce_metrics(outputs), sorted(policy_loss(case.spec, empty_like(rows)).metrics)),
    }


def empty_like(rows: Sequence[Any]) -> Any:
    """Inputs of no sequence, to know the names of the metrics on a rank that had no micro-batch."""
    return loss_inputs([], totals_of(rows), reference=False)


def reduce_over_world(sums: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    """One reduction of all scalar sums, one of all maxima."""
    reduced = {}
    for maximum in (False, True):
        kind = [name for name in names if name.endswith("/max") == maximum and name != "log_s_histogram"]
        vector = torch.tensor([sums.get(name, 0.0) for name in kind], dtype=torch.float64)
        dist.all_reduce(vector, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
        reduced |= dict(zip(kind, vector.tolist(), strict=True))
    return reduced


def main(directory: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory / 'rendezvous'}", rank=rank, world_size=world)
    results = {
        f"{name}@{layout}": run_case(case, layout, rank, world) for name, case in cases().items() for layout in LAYOUTS
    }
    if rank == 0:
        (directory / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
