"""Backward passes of a schedule that are left out because their gradient is 0, in every layout.

The last stage knows from the loss whether a micro-batch has a gradient; a stage before it sees whether what comes
back is 0. Either way it sends zeros on: every send and receive of the schedule stays, recomputation and backward pass
do not run. megatron has no seam for it, so its `backward_step` is replaced for the length of one run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from gspo_megatron.policy.survivors import any_gradient, gradient_of


class ZeroBackward:
    """One run of a schedule."""

    def __init__(self, skip: Callable[[int], None]) -> None:
        """
        Args:
            skip: called with the chunk whose next backward pass is left out.
        """
        self._skip = skip
        self._chunk_of: dict[int, int] = {}
        """By identity of a chunk's output, which the schedule holds until its backward pass."""

    def note(self, output: Tensor, chunk: int) -> Tensor:
        """Remember which chunk gives this output."""
        self._chunk_of[id(output)] = chunk
        return output

    def cut_loss(self, share: Tensor, logprobs: Tensor, chunk: int) -> Tensor:
        """The loss of a micro-batch, cut off from the model where it has no gradient."""
        return self.note(share if any_gradient(gradient_of(share, logprobs)) else share.detach(), chunk)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Around the run."""
        plain = schedules.backward_step

        def backward_step(inputs: Any, outputs: Any, gradients: Any, config: Any) -> Any:
            (output,), (gradient,), entered = _list(outputs), _list(gradients), _list(inputs)
            chunk = self._chunk_of.pop(id(output))
            if output.requires_grad and (gradient is None or any_gradient(gradient)):
                return plain(inputs, outputs, gradients, config)
            self._skip(chunk)
            zeros = [None if tensor is None else torch.zeros_like(tensor) for tensor in entered]
            return zeros if isinstance(inputs, list) else zeros[0]

        schedules.backward_step = backward_step
        try:
            yield
        finally:
            schedules.backward_step = plain


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
