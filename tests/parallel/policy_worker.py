"""One rank of the policy tests: every case is a layout; loss, gradients and exported weights go to CASE.pt (rank 0)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.config import load
from gspo_megatron.data.packing import collate
from gspo_megatron.objective import BatchTotals, LossInputs, ObjectiveSpec, policy_loss
from gspo_megatron.policy import mesh
from gspo_megatron.policy.microbatch import MicroBatch, pad_multiple
from gspo_megatron.policy.policy import OptimizerSettings, Policy, Scored
from gspo_megatron.policy.weights import random_pieces
from tests.parallel.hf_model import read_whole
from tests.parallel.policy_batch import SEED, SEQUENCES, SLOTS, make_samples, old_logprobs


def main() -> None:
    """Run every case of cases.json in one world."""
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    device = mesh.start_world()
    for case in json.loads((directory / "cases.json").read_text()):
        run_case(case, directory, device)
    dist.barrier()


def run_case(case: dict, directory: Path, device: torch.device) -> None:
    recipe = load(Path("recipes/tiny_moe.yaml"), ["model.architecture.initializer_range=0.1", *case["overrides"]])
    arch = recipe.model.architecture
    assert arch is not None
    policy = Policy(recipe, device)
    policy.load(random_pieces(arch, SEED))
    samples = make_samples(arch.vocab_size)
    slots = SLOTS if policy.layout.data < 4 else [[0, 1], [2, 3], [4], [5, 6, 7]]
    mine = [slots[i : i + policy.layout.data][policy.at.data] for i in range(0, len(slots), policy.layout.data)]
    batches = policy.place([collate([samples[i] for i in members], pad_multiple(policy.layout)) for members in mine])
    scored = policy.score(batches)
    if case.get("stale"):
        with torch.no_grad():
            next(policy.chunks[0].parameters()).add_(1e-3)
    totals = BatchTotals(sum(trained > 0 for _, trained in SEQUENCES), sum(trained for _, trained in SEQUENCES))
    spec = ObjectiveSpec.preset("gspo").replace(clip_low=7e-3, clip_high=9e-3)
    exact: list[bool] = []
    moved: list[float] = [0.0]

    def loss(batch: MicroBatch, now: Scored, index: int) -> tuple[torch.Tensor, dict]:
        shift = torch.where(batch.loss_mask, now.logprobs.detach() - scored[index].logprobs, 0.0)
        moved.append(float(shift.abs().max()))
        exact.append(bool(torch.equal(now.logprobs.detach(), scored[index].logprobs)))
        offsets = torch.zeros(len(batch.indices) * policy.layout.context, dtype=torch.float64)
        whole = collate([samples[i] for i in mine[index]], pad_multiple(policy.layout))
        starts = np.asarray(whole.cu_seqlens)
        for row, member in enumerate(mine[index]):
            length, trained = SEQUENCES[member]
            first = int(starts[row]) + length - trained - 1
            offsets[first : first + trained] = old_logprobs(trained, member)
        inputs = LossInputs(
            logprobs=now.logprobs,
            old_logprobs=now.logprobs.detach() - offsets[batch.indices].to(now.logprobs.dtype),
            advantages=batch.advantages,
            loss_mask=batch.loss_mask,
            cu_seqlens=batch.cu_seqlens,
            totals=totals,
            token_advantages=False,
        )
        out = policy_loss(spec, inputs, policy.sum_over_context)
        return out.loss, {"loss": out.loss.detach().double()}

    policy.start_optimizer(OptimizerSettings(0.0, (0.9, 0.95), 1e-8, 0.0, 1e9))
    sums, norm, taken = policy.train(batches, loss, 0.0)
    local = sum((entry["loss"] for entry in sums), torch.zeros((), dtype=torch.float64)) * (policy.at.tensor == 0)
    dist.all_reduce(local)
    gradients = dict(policy.weights.export(2**20, lambda parameter: parameter.main_grad))
    weights = {name: tensor.clone() for name, tensor in policy.export()}
    agree = torch.tensor(float(all(exact)))
    shift = torch.tensor(max(moved))
    dist.all_reduce(shift, dist.ReduceOp.MAX)
    dist.all_reduce(agree, dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        result = {
            "loss": float(local),
            "norm": norm,
            "gradients": gradients,
            "weights": weights,
            "exact": float(agree),
            "shift": float(shift),
            "taken": taken,
        }
        result["loaded"] = read_whole(random_pieces(arch, SEED), arch)
        torch.save(result, directory / f"{case['name']}.pt")


if __name__ == "__main__":
    main()
