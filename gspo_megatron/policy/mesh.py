"""The process groups of the policy, made once by megatron-core's parallel state."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from gspo_megatron.parallel import Layout

COLLECTIVE_TIMEOUT = timedelta(days=1)
"""Ranks wait in a collective while rank 0 waits for responses, possibly for hours; the watchdog ends a stuck run."""

GROUP_TIMEOUT = timedelta(minutes=30)
"""As Megatron gives its own groups."""

ASKED_ONLY = frozenset(
    {
        "DATA_PARALLEL_GROUP",
        "TENSOR_AND_DATA_PARALLEL_GROUP",
        "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP",
        "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP",
    }
)
"""Kinds of groups in which no call of this package communicates; megatron asks their size and rank."""


@dataclass(frozen=True, slots=True)
class ContextShare:
    """Which part of a pack a rank holds."""

    size: int = 1
    """Context-parallel ranks that share the pack."""
    rank: int = 0
    """This one among them."""
    group: dist.ProcessGroup | None = None
    """All of them; None for one rank alone."""
    heads: int = 1
    """Consecutive ones that exchange heads."""
    head_group: dist.ProcessGroup | None = None
    """These; None for one alone."""
    key_group: dist.ProcessGroup | None = None
    """Those that hold other tokens of the same heads, over which the plain-torch spec gathers keys and values."""

    @property
    def is_two_level(self) -> bool:
        """Whether some exchange heads, and these groups meet in turn."""
        return self.head_group is not None and self.key_group is not None

    def sum(self, values: Tensor) -> Tensor:
        """Add a detached [S] tensor, of the sequences of the pack, over the ranks that share it."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values


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


def build_groups(layout: Layout) -> dict[int, ContextShare]:
    """Make all process groups of a layout; an earlier layout's are dropped first.

    Returns:
        For each number of ranks that may share a pack, this rank's part of it.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    inner = layout.head_ranks(layout.context)
    with _used_groups_only():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
            context_parallel_size=layout.context,
            hierarchical_context_parallel_sizes=[inner, layout.context // inner]
            if 1 < inner < layout.context
            else None,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            # Only megatron's own checkpoint of its distributed optimizer would use one beside each of NCCL.
            create_gloo_process_groups=False,
        )
    rank = dist.get_rank()
    place = layout.coordinates(rank).context
    shares = {}
    for size in layout.context_sizes:
        group = _context_group(layout, rank, size) if size > 1 else None
        heads = layout.head_ranks(size)
        head_group, key_group = (group, None) if heads == size else (None, group)
        if 1 < heads < size:
            levels = parallel_state.get_hierarchical_context_parallel_groups()
            assert levels is not None
            head_group, key_group = levels
        shares[size] = ContextShare(size, place % size, group, heads, head_group, key_group)
    return shares


@contextmanager
def _used_groups_only() -> Iterator[None]:
    """No rendezvous of the whole world for a group that nothing needs, of which megatron makes 601 of 891 at 128 ranks.

    Each rank by itself has one group for all kinds of parallelism that a layout lacks: no collective connects one, so
    nothing can tell them apart. A kind of `ASKED_ONLY` knows size and rank and has no backend: torch refuses a
    collective in it.
    """
    make, alone, own = parallel_state.create_group, dict[int, Any](), dist.get_rank()

    def create_group(ranks: Sequence[int], *given: Any, **named: Any) -> Any:
        if len(ranks) > 1 and named["group_desc"] in ASKED_ONLY:
            return dist.ProcessGroup(dist.HashStore(), ranks.index(own), len(ranks)) if own in ranks else None
        if len(ranks) > 1:
            return make(ranks, *given, **named)
        (rank,) = ranks
        if rank not in alone:
            alone[rank] = make(ranks, *given, **named)
        return alone[rank]

    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = make


def _context_group(layout: Layout, rank: int, size: int) -> dist.ProcessGroup:
    """This rank's group of `size` consecutive context-parallel ranks. Every rank makes the groups of all, in order."""
    if size == layout.context:
        whole = parallel_state.get_context_parallel_group()
        assert isinstance(whole, dist.ProcessGroup)
        return whole
    found: dist.ProcessGroup | None = None
    # Context-parallel ranks are TP apart, and blocks of them are aligned: every start is a rank of such a block.
    for start in range(layout.world):
        if start // layout.tensor % size:
            continue
        members = [start + layout.tensor * step for step in range(size)]
        group = parallel_state.create_group(members, GROUP_TIMEOUT, group_desc=f"CONTEXT_PARALLEL_GROUP_OF_{size}")
        if rank in members:
            assert isinstance(group, dist.ProcessGroup)
            found = group
    assert found is not None
    return found
