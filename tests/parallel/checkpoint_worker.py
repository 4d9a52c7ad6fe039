"""One rank of the checkpoint test: train, keep the state, train on; then the same from the state, in a fresh policy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.config import load
from gspo_megatron.data.packing import collate
from gspo_megatron.policy import mesh
from gspo_megatron.policy.checkpoint import policy_state, restore_policy
from gspo_megatron.policy.microbatch import MicroBatch, pad_multiple
from gspo_megatron.policy.policy import OptimizerSettings, Policy, Scored
from gspo_megatron.policy.weights import random_pieces
from tests.parallel.policy_batch import SLOTS, make_samples

SETTINGS = OptimizerSettings(1e-3, (0.9, 0.95), 1e-8, 0.01, 1.0)


def main() -> None:
    """Run every case of cases.json in one world; rank R writes its verdicts to verdict-R.json."""
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    device = mesh.start_world()
    cases = json.loads((directory / "cases.json").read_text())
    verdicts = {name: run_case(overrides, directory, device) for name, overrides in cases.items()}
    (directory / f"verdict-{dist.get_rank()}.json").write_text(json.dumps(verdicts))
    dist.barrier()


def run_case(overrides: list[str], directory: Path, device: torch.device) -> dict[str, bool]:
    """Whether the resumed run ends with the same bits, whether another one would not, and whether the file is plain."""
    recipe = load(Path("recipes/tiny_moe.yaml"), overrides)
    arch = recipe.model.architecture
    assert arch is not None
    first = start(Policy(recipe, device), seed=3)
    train(first, steps=2)
    file = directory / f"state-{dist.get_rank()}.pt"
    torch.save(policy_state(first), file)
    middle = weights(first)
    train(first, steps=2)
    second = start(Policy(recipe, device), seed=4)
    restore_policy(second, torch.load(file, weights_only=True))
    restored = same(weights(second), middle)
    train(second, steps=2)
    # The same weights with fresh moments: what a checkpoint without the optimizer would give.
    third = start(Policy(recipe, device), seed=3)
    train(third, steps=2)
    third.start_optimizer(SETTINGS)
    train(third, steps=2)
    return {
        "restored": restored,
        "same": same(weights(second), weights(first)),
        "moments_matter": not same(weights(third), weights(first)),
    }


def start(policy: Policy, seed: int) -> Policy:
    """Random weights and a fresh optimizer."""
    arch = policy.recipe.model.architecture
    assert arch is not None
    policy.load(random_pieces(arch, seed))
    policy.start_optimizer(SETTINGS)
    return policy


def train(policy: Policy, steps: int) -> None:
    """Optimizer steps of cross entropy on the fixed batch."""
    arch = policy.recipe.model.architecture
    assert arch is not None
    samples = make_samples(arch.vocab_size)
    mine = [SLOTS[i : i + policy.layout.data][policy.at.data] for i in range(0, len(SLOTS), policy.layout.data)]
    batches = policy.place([collate([samples[i] for i in members], pad_multiple(policy.layout)) for members in mine])

    def loss(batch: MicroBatch, scored: Scored, _: int) -> tuple[Tensor, dict[str, Tensor]]:
        return -torch.where(batch.loss_mask, scored.logprobs, 0.0).sum() / 48, {}

    for _ in range(steps):
        policy.train(batches, loss, 1e-3)


def weights(policy: Policy) -> dict[str, Tensor]:
    """A copy of this rank's weights."""
    return {name: tensor.clone() for name, tensor in policy_state(policy)["weights"].items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


if __name__ == "__main__":
    main()
