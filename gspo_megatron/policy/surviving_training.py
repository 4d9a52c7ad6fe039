"""Gradients of a mini-batch where only sequences that have one are recomputed: no pipeline stages, recompute=full.

Every micro-batch goes forward once without gradients. The loss then says which sequences have a gradient; layers are
recomputed, and go backward, with the tokens of those alone. Sequences of a pack do not see each other and experts take
tokens one by one, so the gradient is that of the whole pack. In forward passes: 1 + 3 (1 - f) instead of 4, f = the
share without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import backward_step
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from gspo_megatron.policy.chunk_pass import ChunkPass
from gspo_megatron.policy.head import HeadOutput
from gspo_megatron.policy.layer_outputs import LayerOutputs
from gspo_megatron.policy.microbatch import MicroBatch, narrow
from gspo_megatron.policy.replay import Routing
from gspo_megatron.policy.survivors import gradient_of, surviving_sequences

Share = Callable[[int, HeadOutput], tuple[Tensor, dict[str, Any]]]
"""(index of the micro-batch, head output) -> (share of the loss as gradients are scaled, metric sums)."""


class NewPass(Protocol):
    """Makes the pass of a micro-batch."""

    def __call__(self, batch: MicroBatch, known: HeadOutput | None = None) -> ChunkPass: ...


class SurvivingTraining:
    """Forward and backward passes of one chunk that is the whole model."""

    def __init__(self, chunk: Any, layers: LayerOutputs, routing: Routing, new_pass: NewPass) -> None:
        self.chunk, self.layers, self.routing, self.new_pass = chunk, layers, routing, new_pass

    def run(self, batches: Sequence[MicroBatch], parts: int, share: Share) -> list[dict[str, Any]]:
        """Add the gradients of a mini-batch to the buffers; every rank passes the same number of micro-batches.

        The routers must be recording (`Routing.run`): the second pass chooses the experts of the first.

        Args:
            batches: of this rank.
            parts: tensor-parallel size.
            share: gives the loss of one.

        Returns:
            Metric sums of each micro-batch.
        """
        sums = []
        for index, batch in enumerate(batches):
            one = self.new_pass(batch)
            with torch.no_grad(), self.layers.keep(), self.routing.forward(0, index):
                one.run(self.chunk)
            logprobs = one.found[0].logprobs.detach().requires_grad_()
            loss, found = share(index, one.found[0]._replace(logprobs=logprobs))
            sums.append(found)
            gradient = gradient_of(loss, logprobs)
            members, starts = surviving_sequences(gradient, batch.cu_seqlens, batch.share)
            if members:
                self._go_back(index, one, gradient, (members, starts), parts)
        return sums

    def _go_back(
        self,
        index: int,
        one: ChunkPass,
        gradient: Tensor,
        survivors: tuple[list[int], list[int]],
        parts: int,
    ) -> None:
        members, starts = survivors
        batch, known = one.batch, HeadOutput(*(part.detach() for part in one.found[0]))
        mine: Tensor | None = None
        if len(members) < len(starts) - 1:
            batch, rows = narrow(one.batch, starts, members)
            known, gradient = HeadOutput(*(part[rows] for part in known)), gradient[rows]
            mine = self.routing.of_this_rank(rows)
        cut = partial(_cut, mine=mine, parts=parts)
        with self.routing.known(index, cut):
            with self.layers.take(cut):
                logprobs = self.new_pass(batch, known).run(self.chunk)
            backward_step(None, (logprobs * gradient).sum(), None, self.chunk.config)


def _cut(states: Tensor, mine: Tensor | None, parts: int) -> Tensor:
    """[T_new / TP, ...] of [T_rank, ...]: this rank's rows of the sequences that are left.

    Args:
        states: this tensor-parallel rank's rows of the whole pack.
        mine: [T_new / TP] which rows of all ranks; None = all sequences are left.
        parts: tensor-parallel size.
    """
    if mine is None:
        return states
    return (_gather(states) if parts > 1 else states).index_select(0, mine)


@torch.no_grad()
def _gather(states: Tensor) -> Tensor:
    """[T_local, ...] of [T_rank, ...]: the rows of all tensor-parallel ranks."""
    group: Any = parallel_state.get_tensor_model_parallel_group()
    if states.is_floating_point():
        return gather_from_sequence_parallel_region(states, group=group)
    # Stored routes by their bytes: gloo and NCCL have no int16.
    return gather_from_sequence_parallel_region(states.view(torch.uint8), group=group).view(states.dtype)
