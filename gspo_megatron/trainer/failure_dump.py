"""What is kept of an update that went wrong: enough to compute its loss again without a model, by `gspo debug`.

alarms/update_000012/   bundle.json                   reason, objective, denominators, metrics, layout
                        rank_00001.safetensors        tokens, masks, advantages and log-probs of its micro-batches
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.policy.policy import Policy
from gspo_megatron.policy.weights import write_tensors
from gspo_megatron.run_dir import DUMP, RunDir
from gspo_megatron.trainer.batches import MiniBatch, TrainingMicroBatch
from gspo_megatron.trainer.failure_replay import BUNDLE

CODES = ("first-minibatch-moved",)
"""Warnings of a step after which its first update is kept."""
MOST = 5
"""Dumps of a run: a fault that repeats must not fill the disk."""


@dataclass(frozen=True, slots=True)
class TrainedUpdate:
    """One optimizer step of this rank, until the end of its rollout batch."""

    number: int
    """Updates of the run, this one included."""
    minibatch: MiniBatch[TrainingMicroBatch]
    """What it trained on."""
    logprobs: Sequence[Tensor]
    """[T_local] of each micro-batch in the training pass; empty off the last stage."""
    clipped: Sequence[Tensor]
    """[2, S] of each: `LossOutput.clipped`."""
    values: Sequence[Tensor] = ()
    """[T_local] of each, the critic's in the training pass; none without one."""


def write_dump(
    run: RunDir, policy: Policy, spec: ObjectiveSpec, update: TrainedUpdate, about: dict[str, Any]
) -> Path | None:
    """Write an update to the run directory, once; every rank calls it.

    Args:
        run: the run directory.
        policy: the policy that the update is of.
        spec: the objective.
        update: what to keep.
        about: `reason` and whatever else the reader should see.

    Returns:
        The directory of the dump; None when the run has kept `MOST` others.
    """
    directory = run.dump(update.number)
    kept = DUMP.find(run.alarms) if dist.get_rank() == 0 else {}
    found = [update.number in kept, len(kept) >= MOST]
    dist.broadcast_object_list(found, src=0)
    if any(found):
        return directory if found[0] else None
    directory.mkdir(parents=True, exist_ok=True)
    if policy.is_last_stage and policy.at.tensor == 0:
        tensors = {
            f"{index}/{name}": tensor.detach().cpu().contiguous()
            for index in range(len(update.logprobs))
            for name, tensor in _tensors(update, index, spec).items()
        }
        write_tensors(tensors, directory / f"rank_{dist.get_rank():05d}.safetensors")
    if dist.get_rank() == 0:
        content = {
            "update": update.number,
            **about,
            "objective": spec.model_dump(mode="json"),
            "totals": asdict(update.minibatch.totals),
        }
        (directory / BUNDLE).write_text(json.dumps(content, indent=1))
    dist.barrier()
    return directory


def _tensors(update: TrainedUpdate, index: int, spec: ObjectiveSpec) -> dict[str, Tensor]:
    micro, now = update.minibatch.micro_batches[index], update.logprobs[index]
    old, staleness = update.minibatch.old_logprobs(index, now), update.minibatch.staleness(index, spec)
    batch = micro.batch
    found = {
        "targets": batch.targets,
        "loss_mask": batch.loss_mask,
        "advantages": micro.advantages,
        "rollout_logprobs": batch.rollout_logprobs,
        "cu_seqlens": batch.cu_seqlens,
        "indices": batch.indices,
        "ranks": torch.tensor(batch.share.size),
        # Where nothing computed them, the ratio divides by the sampler's.
        "old_logprobs": batch.rollout_logprobs if old is None else old,
        "logprobs": now,
    }
    if staleness is not None:
        found["staleness"] = staleness
    if spec.has_critic and micro.old is not None and micro.old.values is not None and micro.returns is not None:
        found |= {"values": update.values[index], "old_values": micro.old.values, "returns": micro.returns}
    if micro.reference is not None:
        found["reference_logprobs"] = micro.reference.logprobs
    return found
