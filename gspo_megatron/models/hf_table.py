"""The weight table: what every trainer rank holds of a model, and every tensor of its Hugging Face checkpoint.

Loading, saving, updating the servers and counting all read this table. The rows of a layer come from the model's
family; embedding, final norm and head are the same in all of them.

Megatron names here are global: layer and expert numbers count over the whole model, whatever the stage or the rank.
"""

from __future__ import annotations

import math

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.registry import family_of
from gspo_megatron.models.trainer_cuts import Parameter, Piece, cut_rows, whole
from gspo_megatron.parallel import Coordinates, Layout

__all__ = ["Parameter", "Piece", "count_parameters", "critic_parameters", "hf_shapes", "local_parameters",
           "trained_parameters"]  # fmt: skip

VALUE_HEAD = "value_head.weight"
"""Of a critic, the same in the trainer's and in the table's words: it is in no Hugging Face checkpoint."""
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every tensor of the Hugging Face checkpoint, in file order."""
    family = family_of(arch)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (arch.vocab_size, arch.hidden_size)}
    for layer in range(arch.num_hidden_layers):
        shapes.update(family.layer_shapes(arch, layer))
    shapes[FINAL_NORM] = (arch.hidden_size,)
    if not arch.tie_word_embeddings:
        shapes[HEAD] = (arch.vocab_size, arch.hidden_size)
    return shapes


def count_parameters(arch: Architecture) -> int:
    """Parameters of the whole model."""
    return sum(math.prod(shape) for shape in hf_shapes(arch).values())


def local_parameters(arch: Architecture, layout: Layout, at: Coordinates, chunk: int = 0) -> list[Parameter]:
    """Everything that the rank at these coordinates holds of one model chunk."""
    family, layers = family_of(arch), layout.layers(arch.num_hidden_layers, at.pipeline, chunk)
    held: list[Parameter] = []

    def hold_vocabulary(name: str, tensor: str) -> None:
        held.append(cut_rows(name, tensor, arch.vocab_size, arch.hidden_size, at.tensor, layout.tensor))

    if 0 in layers:
        hold_vocabulary("embedding.word_embeddings.weight", EMBEDDING)
    for layer in layers:
        held.extend(family.layer_parameters(arch, layout, at, layer))
    if arch.num_hidden_layers - 1 in layers:
        held.append(whole("decoder.final_layernorm.weight", FINAL_NORM, (arch.hidden_size,)))
        if not arch.tie_word_embeddings:
            hold_vocabulary("output_layer.weight", HEAD)
        elif 0 not in layers:
            # A tied head on a stage of its own is a second copy of the embedding.
            hold_vocabulary("output_layer.weight", EMBEDDING)
    return held


def critic_parameters(arch: Architecture, layout: Layout, at: Coordinates, chunk: int = 0) -> list[Parameter]:
    """What a critic adds to one model chunk of that rank: the value head beside the last layer, whole on every rank."""
    holds = arch.num_hidden_layers - 1 in layout.layers(arch.num_hidden_layers, at.pipeline, chunk)
    return [whole(VALUE_HEAD, VALUE_HEAD, (arch.hidden_size,))] if holds else []


def trained_parameters(
    arch: Architecture, layout: Layout, at: Coordinates, chunk: int = 0, critic: bool = True
) -> list[Parameter]:
    """Everything of one model chunk that the rank at these coordinates trains, in the order of the model."""
    added = critic_parameters(arch, layout, at, chunk) if critic else []
    return [*local_parameters(arch, layout, at, chunk), *added]
