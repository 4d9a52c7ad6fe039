"""Megatron's arguments for which layers a pipeline stage has, as plain values."""

from __future__ import annotations

from typing import Any

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.trainer_section import TrainerSection
from gspo_megatron.parallel import layout_of


def stage_arguments(arch: Architecture, trainer: TrainerSection) -> dict[str, Any]:
    """Return arguments of `TransformerConfig`. Megatron divides equal chunks itself; others are listed one by one."""
    layout = layout_of(trainer, trainer.pipeline_parallel)
    sizes = layout.chunk_sizes(arch.num_hidden_layers)
    if all(len(set(chunks)) == 1 for chunks in sizes):
        return {
            "num_layers_in_first_pipeline_stage": trainer.first_stage_layers,
            "num_layers_in_last_pipeline_stage": trainer.last_stage_layers,
        }
    # One letter a layer, E the embedding and L the head.
    listed = "|".join("t" * chunks[chunk] for chunk in range(layout.virtual) for chunks in sizes)
    return {"pipeline_model_parallel_layout": f"E{listed}L"}
