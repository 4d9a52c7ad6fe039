"""The one table between Hugging Face names and Megatron names of Qwen3 and Qwen3-MoE.

Every Megatron parameter is described by the pieces of Hugging Face tensors it is made of: which rows and columns of
which tensor land in which of its rows. Loading, saving, updating the servers and counting all read this table.

Megatron names here are global: layer and expert numbers count over the whole model, whatever the stage or the rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.parallel import Coordinates, Layout


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a Hugging Face tensor and the rows of the local parameter it fills."""

    tensor: str
    """Hugging Face name."""
    rows: tuple[int, int]
    """Range of its dimension 0."""
    columns: tuple[int, int] | None
    """Range of its dimension 1; None for a vector."""
    at: tuple[int, int]
    """Range of dimension 0 of the local parameter; a piece fills all of its columns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rectangle."""
        height = self.rows[1] - self.rows[0]
        return (height,) if self.columns is None else (height, self.columns[1] - self.columns[0])


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter as one rank holds it."""

    name: str
    """Global Megatron name, in the layer spec without fused norms."""
    shape: tuple[int, ...]
    """Local shape."""
    pieces: tuple[Piece, ...]
    """Cover the local parameter."""
    expert: bool = False
    """Belongs to an expert: reduced and replicated over the expert side of the layout."""


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every tensor of the Hugging Face checkpoint, in file order."""
    hidden, head = arch.hidden_size, arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (arch.vocab_size, hidden)}
    for layer in range(arch.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        shapes[attention + "q_proj.weight"] = (arch.num_attention_heads * head, hidden)
        shapes[attention + "k_proj.weight"] = (arch.num_key_value_heads * head, hidden)
        shapes[attention + "v_proj.weight"] = (arch.num_key_value_heads * head, hidden)
        shapes[attention + "o_proj.weight"] = (hidden, arch.num_attention_heads * head)
        shapes[attention + "q_norm.weight"] = (head,)
        shapes[attention + "k_norm.weight"] = (head,)
        if arch.num_experts:
            shapes[prefix + "mlp.gate.weight"] = (arch.num_experts, hidden)
        for mlp, width in _mlps(arch, prefix):
            shapes[mlp + "gate_proj.weight"] = (width, hidden)
            shapes[mlp + "up_proj.weight"] = (width, hidden)
            shapes[mlp + "down_proj.weight"] = (hidden, width)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not arch.tie_word_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, hidden)
    return shapes


def count_parameters(arch: Architecture) -> int:
    """Parameters of the whole model."""
    return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in hf_shapes(arch).values())


def _mlps(arch: Architecture, prefix: str) -> Iterator[tuple[str, int]]:
    if not arch.num_experts:
        yield prefix + "mlp.", arch.intermediate_size
    for expert in range(arch.num_experts):
        yield f"{prefix}mlp.experts.{expert}.", arch.moe_intermediate_size


def local_parameters(arch: Architecture, layout: Layout, at: Coordinates, chunk: int = 0) -> list[Parameter]:
    """Everything that the rank at these coordinates holds of one model chunk."""
    layers = layout.layers(arch.num_hidden_layers, at.pipeline, chunk)
    held: list[Parameter] = []
    if 0 in layers:
        held.append(
            _rows(
                "embedding.word_embeddings.weight",
                "model.embed_tokens.weight",
                arch.vocab_size,
                arch,
                at.tensor,
                layout.tensor,
            )
        )
    for layer in layers:
        held.extend(_layer(arch, layout, at, layer))
    if arch.num_hidden_layers - 1 in layers:
        held.append(_whole("decoder.final_layernorm.weight", "model.norm.weight", (arch.hidden_size,)))
        if not arch.tie_word_embeddings:
            held.append(_rows("output_layer.weight", "lm_head.weight", arch.vocab_size, arch, at.tensor, layout.tensor))
        elif 0 not in layers:
            # A tied head on a stage of its own is a second copy of the embedding.
            held.append(
                _rows(
                    "output_layer.weight", "model.embed_tokens.weight", arch.vocab_size, arch, at.tensor, layout.tensor
                )
            )
    return held


def _layer(arch: Architecture, layout: Layout, at: Coordinates, layer: int) -> Iterator[Parameter]:
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    hidden = arch.hidden_size
    yield _whole(ours + "input_layernorm.weight", theirs + "input_layernorm.weight", (hidden,))
    yield _qkv(arch, ours, theirs, at.tensor, layout.tensor)
    yield _whole(ours + "self_attention.q_layernorm.weight", theirs + "self_attn.q_norm.weight", (arch.head_dim,))
    yield _whole(ours + "self_attention.k_layernorm.weight", theirs + "self_attn.k_norm.weight", (arch.head_dim,))
    width = arch.num_attention_heads * arch.head_dim
    yield _columns(
        ours + "self_attention.linear_proj.weight",
        theirs + "self_attn.o_proj.weight",
        hidden,
        width,
        at.tensor,
        layout.tensor,
    )
    yield _whole(ours + "pre_mlp_layernorm.weight", theirs + "post_attention_layernorm.weight", (hidden,))
    if not arch.num_experts:
        yield from _mlp(ours + "mlp.", theirs + "mlp.", hidden, arch.intermediate_size, at.tensor, layout.tensor, False)
        return
    yield _whole(ours + "mlp.router.weight", theirs + "mlp.gate.weight", (arch.num_experts, hidden))
    per_rank = arch.num_experts // layout.expert
    for expert in range(at.expert * per_rank, (at.expert + 1) * per_rank):
        yield from _mlp(
            f"{ours}mlp.experts.{expert}.", f"{theirs}mlp.experts.{expert}.", hidden, arch.moe_intermediate_size,
            at.expert_tensor, layout.expert_tensor, True,
        )  # fmt: skip


def _whole(name: str, tensor: str, shape: tuple[int, ...]) -> Parameter:
    rows = (0, shape[0])
    columns = (0, shape[1]) if len(shape) > 1 else None
    return Parameter(name, shape, (Piece(tensor, rows, columns, rows),))


def _rows(name: str, tensor: str, height: int, arch: Architecture, index: int, count: int) -> Parameter:
    part = height // count
    rows = (index * part, (index + 1) * part)
    return Parameter(name, (part, arch.hidden_size), (Piece(tensor, rows, (0, arch.hidden_size), (0, part)),))


def _columns(
    name: str, tensor: str, height: int, width: int, index: int, count: int, expert: bool = False
) -> Parameter:
    part = width // count
    piece = Piece(tensor, (0, height), (index * part, (index + 1) * part), (0, height))
    return Parameter(name, (height, part), (piece,), expert)


def _qkv(arch: Architecture, ours: str, theirs: str, index: int, count: int) -> Parameter:
    """Rows of one key-value group lie together: its queries, then its key, then its value; TP cuts them evenly.

    With more ranks than groups the cuts fall inside a group, even inside a head: no row is held twice. Megatron gathers
    the product over the tensor-parallel ranks and each rank picks its queries and their group's key and value.
    """
    head, hidden = arch.head_dim, arch.hidden_size
    queries = arch.num_attention_heads // arch.num_key_value_heads * head
    part = (queries + 2 * head) * arch.num_key_value_heads // count
    first, last = index * part, (index + 1) * part
    pieces: list[Piece] = []
    row = 0
    for group in range(arch.num_key_value_heads):
        for tensor, height in (("q_proj", queries), ("k_proj", head), ("v_proj", head)):
            start, end = max(row, first), min(row + height, last)
            if start < end:
                source = (group * height + start - row, group * height + end - row)
                at = (start - first, end - first)
                pieces.append(Piece(f"{theirs}self_attn.{tensor}.weight", source, (0, hidden), at))
            row += height
    return Parameter(ours + "self_attention.linear_qkv.weight", (part, hidden), tuple(pieces))


def _mlp(ours: str, theirs: str, hidden: int, width: int, index: int, count: int, expert: bool) -> Iterator[Parameter]:
    """Gate and up projections share one parameter; each is cut first, then they are stacked."""
    part = width // count
    rows = (index * part, (index + 1) * part)
    pieces = tuple(
        Piece(f"{theirs}{tensor}.weight", rows, (0, hidden), (slot * part, (slot + 1) * part))
        for slot, tensor in enumerate(("gate_proj", "up_proj"))
    )
    yield Parameter(ours + "linear_fc1.weight", (2 * part, hidden), pieces, expert)
    yield _columns(ours + "linear_fc2.weight", theirs + "down_proj.weight", hidden, width, index, count, expert)
