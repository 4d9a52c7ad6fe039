"""Megatron's data-parallel wrapper of a chunk, and the reduction of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_megatron.config.trainer_section import TrainerSection
from gspo_megatron.models.megatron_engine import data_parallel_arguments


class Replica(DistributedDataParallel):
    """Megatron's wrapper, for a head that adds its gradient to the buffer itself and so leaves none behind."""

    def _make_backward_post_hook(self, param: Any) -> Callable[..., None]:
        usual = super()._make_backward_post_hook(param)

        def report(*arguments: Any) -> None:
            if param.grad is None and self.ddp_config.overlap_grad_reduce:
                self.param_to_bucket_group[param].register_grad_ready(param)
            else:
                usual(*arguments)

        return report


def wrap_chunks(
    bare: Sequence[torch.nn.Module], config: TransformerConfig, trainer: TrainerSection, distributes: bool
) -> list[Any]:
    """The chunks in Megatron's data-parallel wrapper; the schedule learns when to reduce their gradients.

    Args:
        bare: chunks of this rank.
        config: of the chunks.
        trainer: what the recipe passes on.
        distributes: whether the replicas share the optimizer's states.
    """
    dtype = str(next(bare[0].parameters()).dtype).removeprefix("torch.")
    settings = DistributedDataParallelConfig(**data_parallel_arguments(trainer, dtype, distributes))
    # Any: megatron annotates lists of its own base class, of which the wrapper is no subtype for a type checker.
    wrapped: list[Any] = [Replica(config=config, ddp_config=settings, module=one) for one in bare]
    config.finalize_model_grads_func = finalize_model_grads
    if settings.overlap_grad_reduce:
        pauses = [chunk.no_sync for chunk in wrapped]
        # megatron annotates one function, and takes a list of one for each chunk too.
        config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]  # type: ignore[assignment]
    return wrapped
