"""Who holds what among the ranks of a vLLM server: its own fused, cut and padded parameters.

The parameters of a layer come from the model's family. Every server compares the list with the parameters that it
really has before it takes the first byte.
"""

from __future__ import annotations

from dataclasses import replace

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.hf_table import EMBEDDING, FINAL_NORM, HEAD
from gspo_megatron.models.registry import family_of
from gspo_megatron.models.server_cuts import ServerLayout, ServerParameter, ServerPiece, hold_vocabulary, hold_whole

__all__ = ["ServerLayout", "ServerParameter", "ServerPiece", "needed_values", "server_parameters"]


def server_parameters(arch: Architecture, layout: ServerLayout, rank: int) -> list[ServerParameter]:
    """Everything that one worker computes with.

    vLLM makes embedding, final norm and head of a mixture of experts on every pipeline stage; only those that their
    stage uses are listed.
    """
    rest, tensor = divmod(rank, layout.tensor)
    data, stage = divmod(rest, layout.pipeline)
    first, last = stage == 0, stage == layout.pipeline - 1
    held: list[ServerParameter] = []
    if first or (last and arch.tie_word_embeddings):
        held.append(hold_vocabulary(arch, EMBEDDING, layout, tensor))
    for layer in layout.layers(arch.num_hidden_layers, stage):
        held.extend(family_of(arch).server_layer(arch, layout, layer, data, tensor))
    if last:
        held.append(hold_whole(FINAL_NORM, (arch.hidden_size,)))
        if not arch.tie_word_embeddings:
            held.append(hold_vocabulary(arch, HEAD, layout, tensor))
    return held


def needed_values(arch: Architecture, layout: ServerLayout, rank: int) -> int:
    """Values of the model that one worker keeps. All layers are alike, so one is counted."""

    def count(layers: int, pipeline: int, stage: int) -> int:
        short = arch.model_copy(update={"num_hidden_layers": layers})
        flat = replace(layout, pipeline=pipeline)
        held = server_parameters(short, flat, flat.rank(data, stage, tensor))
        return sum(piece.size for parameter in held for piece in parameter.pieces)

    rest, tensor = divmod(rank, layout.tensor)
    data, stage = divmod(rest, layout.pipeline)
    bare = count(0, layout.pipeline, stage)
    layer = count(1, 1, 0) - count(0, 1, 0)
    return bare + layer * len(layout.layers(arch.num_hidden_layers, stage))
