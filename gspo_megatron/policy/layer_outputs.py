"""Outputs of the layers of one forward pass, for a second pass that only needs their backward part.

Under full recomputation a layer runs twice: once without gradients, once again in the backward pass. The first run
does not depend on which sequences have a gradient; the second one can be of fewer tokens. So the outputs of the first
run are kept, and the pass with gradients takes them, cut to the tokens that are left, in place of computing them.
What is kept is what full recomputation saves of a micro-batch anyway: the input of every layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.config.schema import Recipe
from gspo_megatron.policy.offload import Kept, to_device, to_host
from gspo_megatron.policy.rotary import PackedModel

Narrow = Callable[[Tensor], Tensor]


class LayerOutputs:
    """The layers of a chunk, each recomputed on its own."""

    def __init__(self, layers: Iterable[torch.nn.Module], on_host: bool) -> None:
        """Put a seam in front of every layer.

        Args:
            layers: of the chunk, in order.
            on_host: keep outputs in host memory, as `trainer.offload_activations` does with what the layers save.
        """
        self._on_host = on_host
        self._keeps = False
        self._narrow: Narrow | None = None
        self._kept: dict[int, Kept] = {}
        for number, layer in enumerate(layers):
            self._install(number, layer)

    @contextlib.contextmanager
    def keep(self) -> Iterator[None]:
        """Around a forward pass without gradients: its outputs replace those of the pass before."""
        self._kept, self._keeps = {}, True
        yield
        self._keeps = False

    @contextlib.contextmanager
    def take(self, narrow: Narrow) -> Iterator[None]:
        """Around the forward pass with gradients: a layer computes nothing until its backward pass.

        Args:
            narrow: picks the rows of an output that are left.
        """
        self._narrow = narrow
        yield
        self._narrow = None

    def _install(self, number: int, layer: torch.nn.Module) -> None:
        forward = layer.forward

        def seam(*args: Any, **kwargs: Any) -> Any:
            # The checkpoint of a layer calls it without gradients first, and with them in the backward pass.
            if self._narrow is not None and not torch.is_grad_enabled():
                return self._narrow(to_device(self._kept.pop(number))), None
            outputs = forward(*args, **kwargs)
            if self._keeps:
                states = outputs[0].detach()
                self._kept[number] = to_host(states) if self._on_host else states
            return outputs

        layer.forward = seam


def seams_of(recipe: Recipe, chunks: Sequence[PackedModel]) -> LayerOutputs | None:
    """The layers of a rank, where a recomputation can be of fewer tokens than the forward pass before it; else None."""
    trainer = recipe.trainer
    if trainer.pipeline_parallel > 1 or trainer.recompute != "full" or not recipe.skips_clipped:
        return None
    return LayerOutputs(chunks[0].decoder.layers, trainer.offload_activations)
