"""The process groups of the policy, made once by megatron-core's parallel state."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from gspo_megatron.parallel import Layout

COLLECTIVE_TIMEOUT = timedelta(days=1)
"""Ranks wait in a collective while rank 0 waits for responses, possibly for hours; the watchdog ends a stuck run."""


def start_world() -> torch.device:
    """Join the world of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; returns this rank's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        # Without `device_id`: with it torch makes a communicator for each of megatron's groups at once, used or not.
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=COLLECTIVE_TIMEOUT)
        return device
    dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    return torch.device("cpu")


def build_groups(layout: Layout) -> None:
    """Make megatron's process groups for a layout; an earlier layout's are dropped first."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        # Only megatron's own checkpoint of its distributed optimizer would use one beside each of NCCL.
        create_gloo_process_groups=False,
    )
