"""One rank of the signal tests: the same updates with and without the passes whose gradient is 0."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gspo_megatron.models import load_recipe
from gspo_megatron.objective import finalize_step
from gspo_megatron.policy import mesh
from gspo_megatron.policy.policy import OptimizerSettings, Policy
from gspo_megatron.policy.weights import random_pieces
from gspo_megatron.run_log import RunLog
from gspo_megatron.trainer.metric_sums import reduce_sums
from gspo_megatron.trainer.step import Trainer
from gspo_megatron.types import SampleRef
from tests.parallel.keep_double import KeepDouble
from tests.parallel.recorded import record
from tests.parallel.replay_worker import gradient_of

PROMPTS, ANSWERS = 8, 4
REWARDS: dict[str, Sequence[Sequence[float]]] = {
    "mixed": [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0.5, 1, 0.5], [0, 0, 0, 0], [0, 1, 1, 1]] + 2 * [[0] * 4],
    "first mini-batch silent": [[1] * 4] * 4 + [[0, 1, 1, 0]] * 4,
    "second mini-batch silent": [[0, 1, 0, 0]] * 4 + [[1] * 4] * 4,
    "all silent": [[1] * 4] * 8,
}
"""Rewards of every group; the batch is cut into two updates of four groups."""


def main() -> None:
    """Run every case of cases.json in one world; CASE.pt comes out of rank 0."""
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    device = mesh.start_world()
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        found = {
            way: run_case(directory / name / way, case, skips, device) for way, skips in (("plain", 0), ("ours", 1))
        }
        if dist.get_rank() == 0:
            torch.save(found, directory / f"{name}.pt")
    dist.barrier()


def run_case(directory: Path, case: dict[str, Any], skips: int, device: torch.device) -> dict[str, Any]:
    """Gradients and metrics of both updates, and how many forward passes a token took."""
    batch = [f"batch.prompts={PROMPTS}", f"batch.answers={ANSWERS}", "batch.updates=2", "reward.bounds=[0, 1]"]
    shape = ["model.architecture.initializer_range=0.1", "trainer.micro_batch_tokens=64", "optimizer.lr=1e-3"]
    overrides = [*batch, *shape, f"trainer.skip_zero_gradients={'true' if skips else 'false'}", *case["overrides"]]
    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), overrides)
    directory.mkdir(parents=True, exist_ok=True)
    policy = Policy(recipe, device, torch.float64 if case["double"] else None)
    policy.load(random_pieces(recipe.arch, 3))
    gradients: list[dict[str, torch.Tensor]] = []
    # megatron and the head compute some numbers in float32 whatever the weights are.
    with KeepDouble() if case["double"] else nullcontext(), RunLog(directory, owns_terminal=False) as log:
        trainer = Trainer(recipe, directory, policy, None, log)
        # Megatron clips no float64 gradient on a CPU.
        policy.start_optimizer(OptimizerSettings(1e-3, (0.9, 0.95), 1e-8, 0.1, clip_grad=0.0))
        step_optimizer(policy, gradients)
        refs = references(trainer, REWARDS[case["rewards"]])
        scored = trainer.score_old_policy(refs)
        minibatches = trainer.assign_advantages(refs, scored)
        sums = [trainer.update(minibatch) for minibatch in minibatches]
        reduced = reduce_sums(sums, trainer._zero_sums)
        metrics = finalize_step(reduced) | trainer.routers.reduce()
    trained = [len(micro.batch.token_ids) for one in minibatches for micro in one.micro_batches if micro.refs]
    return {
        "gradients": gradients, "metrics": metrics, "row": log.row(), "losses": [float(s["loss"]) for s in reduced],
        "tokens": sum(trained), "updates": trainer.updates,
        "weights": dict(policy.export()) if dist.get_rank() == 0 else list(policy.export()) and {},
    }  # fmt: skip


def step_optimizer(policy: Policy, kept: list[dict[str, torch.Tensor]]) -> None:
    """Keep the reduced gradients of every update."""
    step = policy.optimizer.step

    def keep_and_step() -> Any:
        kept.append({name: grad.clone() for name, grad in policy.weights.export(2**20, gradient_of)})
        return step()

    policy.optimizer.step = keep_and_step


def references(trainer: Trainer, rewards: Sequence[Sequence[float]]) -> list[SampleRef]:
    """The recorded responses with the rewards of the case, on every rank."""
    refs: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [record(trainer.store, prompt, sample) for prompt in range(PROMPTS) for sample in range(ANSWERS)]
        refs = [[replace(ref, reward=float(rewards[ref.prompt_index][ref.sample_index])) for ref in found]]
    dist.broadcast_object_list(refs, src=0)
    return refs[0]


if __name__ == "__main__":
    main()
