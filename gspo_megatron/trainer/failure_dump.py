"""What is kept of an update that went wrong: enough to compute its loss again without a model, by `gspo debug`.

alarms/update_000012/   bundle.json                   why, objective, denominators, metrics, layout
                        rank_00001.safetensors        tokens, masks, advantages and log-probs of its micro-batches
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.policy.policy import Policy
from gspo_megatron.trainer.batches import MiniBatch
from gspo_megatron.trainer.failure_replay import BUNDLE

DIRECTORY = "alarms"
CODES = ("first-minibatch-moved",)
"""Warnings of a step after which its first update is kept."""
MOST = 5
"""Bundles of a run: a fault that repeats must not fill the disk."""


def write_bundle(
    run_dir: Path,
    policy: Policy,
    spec: ObjectiveSpec,
    update: int,
    minibatch: MiniBatch,
    logprobs: Sequence[Tensor],
    about: dict[str, Any],
) -> Path | None:
    """Keep an update, once; every rank calls it. None when the run has kept enough.

    Args:
        run_dir: of the run.
        policy: whose ranks hold the batch.
        spec: the objective.
        update: its number.
        minibatch: what it trained on.
        logprobs: [T_local] of each micro-batch in the training pass; last stage only.
        about: `reason` and whatever else the reader should see.
    """
    directory = run_dir / DIRECTORY / f"update_{update:06d}"
    kept = list((run_dir / DIRECTORY).glob("update_*")) if dist.get_rank() == 0 else []
    found = [directory in kept, len(kept) >= MOST]
    dist.broadcast_object_list(found, src=0)
    if any(found):
        return directory if found[0] else None
    directory.mkdir(parents=True, exist_ok=True)
    if policy.is_last_stage and policy.at.tensor == 0:
        tensors = {
            f"{index}/{name}": tensor.detach().cpu().contiguous()
            for index, now in enumerate(logprobs)
            for name, tensor in _micro_batch(minibatch, index, now).items()
        }
        save_file(tensors, directory / f"rank_{dist.get_rank():05d}.safetensors")
    if dist.get_rank() == 0:
        content = {
            "update": update,
            **about,
            "objective": spec.model_dump(mode="json"),
            "totals": asdict(minibatch.totals),
            "context_parallel": policy.layout.context,
        }
        (directory / BUNDLE).write_text(json.dumps(content, indent=1))
    dist.barrier()
    return directory


def _micro_batch(minibatch: MiniBatch, index: int, now: Tensor) -> dict[str, Tensor]:
    batch = minibatch.micro_batches[index]
    found = {
        "targets": batch.targets,
        "loss_mask": batch.loss_mask,
        "advantages": batch.advantages,
        "rollout_logprobs": batch.rollout_logprobs,
        "cu_seqlens": batch.cu_seqlens,
        "indices": batch.indices,
        "old_logprobs": minibatch.old[index].logprobs,
        "logprobs": now,
    }
    if minibatch.reference is not None:
        found["reference_logprobs"] = minibatch.reference[index].logprobs
    return found
