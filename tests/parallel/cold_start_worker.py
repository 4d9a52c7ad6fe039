"""Fine-tunes on own demonstrations: writes the loss before and after, and what the loss asks of every log-prob."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.data.own_demonstrations import draw_demonstrations
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.models import load_recipe
from gspo_megatron.policy import mesh
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.policy import LossFunction, Policy, Scored
from gspo_megatron.policy.weights import random_pieces
from gspo_megatron.run_log import RunLog
from gspo_megatron.trainer.cold_start import fine_tune
from gspo_megatron.trainer.step import Trainer

directory = Path(sys.argv[1])
recipe = load_recipe(Path("recipes/tiny_moe.yaml"), json.loads((directory / "cases.json").read_text()))
policy = Policy(recipe, mesh.start_world())
policy.load(random_pieces(recipe.arch, recipe.run.seed))
trainer = Trainer(recipe, directory, policy, None, RunLog(directory, owns_terminal=False))
section = recipe.cold_start
assert section is not None
samples, _ = draw_demonstrations(recipe, load_tokenizer(recipe.tokenizer, None), lambda question: False, 16)


def mean_losses() -> list[float]:
    """Of trained targets and of context, over all ranks."""
    batches = trainer.batcher.place_samples(samples)
    sums = torch.zeros(4, dtype=torch.float64)
    for batch, scored in zip(batches, policy.score(batches), strict=True):
        for place, mask in enumerate((batch.loss_mask, ~batch.loss_mask)):
            sums[place] -= scored.logprobs[mask].sum()
            sums[2 + place] += mask.sum()
    dist.all_reduce(sums)
    return (sums[:2] / sums[2:]).tolist()


def watched(loss: LossFunction) -> LossFunction:
    def watch(batch: MicroBatch, scored: Scored, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        value, sums = loss(batch, scored, index)
        (slopes,) = torch.autograd.grad(value, scored.logprobs, retain_graph=True)
        masked.append(float(slopes[~batch.loss_mask].abs().max()))
        trained.append(float(slopes[batch.loss_mask].max()) if batch.loss_mask.any() else -1.0)
        return value, sums

    return watch


masked: list[float] = []
trained: list[float] = []
train = policy.train


def train_watched(batches: Any, loss: LossFunction, *more: Any, **options: Any) -> Any:
    return train(batches, watched(loss), *more, **options)


before = mean_losses()
policy.train = train_watched  # type: ignore[method-assign]
fine_tune(trainer, section)
found = {"before": before, "after": mean_losses(), "masked": masked, "trained": trained}
(directory / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
