"""Who holds what among the ranks of a vLLM server: its own fused, sharded and padded parameters, as plain arithmetic.

Derived from vLLM's sharding rules and not recorded from a live server: the planner needs it before a server runs, and
in trainer processes, which cannot import vllm. Every server compares it with the parameters that it really has before
it takes the first byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gspo_megatron.config.model_section import Architecture

VOCABULARY_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this before it cuts it (`DEFAULT_VOCAB_PADDING_SIZE`)."""


@dataclass(frozen=True, slots=True)
class ServerLayout:
    """The parallel layout of one vLLM server. Ranks count tensor fastest, then pipeline, then data."""

    tensor: int = 1
    """TP of attention, embedding and head."""
    pipeline: int = 1
    """PP stages."""
    data: int = 1
    """Attention replicas within the server; experts are spread over tensor * data ranks."""
    expert_parallel: bool = False
    """Whole experts on each of the tensor * data ranks, instead of a slice of every expert."""

    @property
    def world(self) -> int:
        """Worker processes."""
        return self.tensor * self.pipeline * self.data

    def rank(self, data: int, pipeline: int, tensor: int) -> int:
        """Worker number of a place."""
        return (data * self.pipeline + pipeline) * self.tensor + tensor

    def layers(self, num_layers: int, stage: int) -> range:
        """Layers of one stage; a remainder goes to the stages before the last, from the back."""
        least, rest = divmod(num_layers, self.pipeline)
        sizes = [least + (self.pipeline - 1 - rest <= index < self.pipeline - 1) for index in range(self.pipeline)]
        start = sum(sizes[:stage])
        return range(start, start + sizes[stage])


@dataclass(frozen=True, slots=True)
class ServerPiece:
    """A rectangle of a Hugging Face tensor and where its first value lands in a parameter of this rank."""

    tensor: str
    """Hugging Face name."""
    rows: tuple[int, int]
    """Range of its dimension 0."""
    columns: tuple[int, int] | None
    """Range of its dimension 1; None for a vector."""
    at: tuple[int, int, int]
    """(expert, row, column) within the parameter; the expert is 0 where it has no such dimension, as is the column of a
    vector."""

    @property
    def row(self) -> int:
        """Its first row in that tensor."""
        return self.rows[0]

    @property
    def column(self) -> int:
        """Its first column there; 0 for a vector."""
        return self.columns[0] if self.columns else 0

    @property
    def height(self) -> int:
        """Rows."""
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        """Columns; 1 for a vector."""
        return self.columns[1] - self.columns[0] if self.columns else 1

    @property
    def size(self) -> int:
        """Values."""
        return self.height * self.width


@dataclass(frozen=True, slots=True)
class ServerParameter:
    """One vLLM parameter as one rank holds it before any kernel repacks it."""

    name: str
    """`model.layers.3.mlp.experts.routed_experts.w13_weight`"""
    shape: tuple[int, ...]
    """Local shape, padding included."""
    pieces: tuple[ServerPiece, ...]
    """Cover all of it but the padding."""


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
        held.append(_vocabulary(arch, "model.embed_tokens.weight", layout, tensor))
    for layer in layout.layers(arch.num_hidden_layers, stage):
        held.extend(_layer(arch, layout, f"model.layers.{layer}.", data, tensor))
    if last:
        held.append(_whole("model.norm.weight", (arch.hidden_size,)))
        if not arch.tie_word_embeddings:
            held.append(_vocabulary(arch, "lm_head.weight", layout, tensor))
    return held


def _vocabulary(arch: Architecture, name: str, layout: ServerLayout, tensor: int) -> ServerParameter:
    padded = -(-arch.vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING
    part = _share(padded, layout.tensor, "the padded vocabulary")
    rows = (min(tensor * part, arch.vocab_size), min((tensor + 1) * part, arch.vocab_size))
    pieces = (ServerPiece(name, rows, (0, arch.hidden_size), (0, 0, 0)),) if rows[0] < rows[1] else ()
    return ServerParameter(name, (part, arch.hidden_size), pieces)


def _layer(arch: Architecture, layout: ServerLayout, prefix: str, data: int, tensor: int) -> Iterator[ServerParameter]:
    hidden, head, attention = arch.hidden_size, arch.head_dim, prefix + "self_attn."
    yield _whole(prefix + "input_layernorm.weight", (hidden,))
    yield _whole(prefix + "post_attention_layernorm.weight", (hidden,))
    yield _whole(attention + "q_norm.weight", (head,))
    yield _whole(attention + "k_norm.weight", (head,))
    queries = _share(arch.num_attention_heads, layout.tensor, "num_attention_heads") * head
    groups, copies = arch.num_key_value_heads, 1
    if layout.tensor > groups:
        # A head that does not divide is held by several ranks.
        copies = _share(layout.tensor, groups, "tensor-parallel ranks over num_key_value_heads")
    keys = _share(groups * copies, layout.tensor, "num_key_value_heads") * head
    pieces = _stack(
        [
            (attention + "q_proj.weight", queries, tensor),
            (attention + "k_proj.weight", keys, tensor // copies),
            (attention + "v_proj.weight", keys, tensor // copies),
        ],
        hidden,
    )
    yield ServerParameter(attention + "qkv_proj.weight", (queries + 2 * keys, hidden), pieces)
    yield _columns(attention + "o_proj.weight", hidden, queries, tensor)
    if arch.num_experts:
        yield _whole(prefix + "mlp.gate.weight", (arch.num_experts, hidden))
        yield from _experts(arch, layout, prefix + "mlp.experts.", data * layout.tensor + tensor)
        return
    width = _share(arch.intermediate_size, layout.tensor, "intermediate_size")
    both = [(f"{prefix}mlp.{part}_proj.weight", width, tensor) for part in ("gate", "up")]
    yield ServerParameter(prefix + "mlp.gate_up_proj.weight", (2 * width, hidden), _stack(both, hidden))
    yield _columns(prefix + "mlp.down_proj.weight", hidden, width, tensor)


def _experts(arch: Architecture, layout: ServerLayout, prefix: str, index: int) -> Iterator[ServerParameter]:
    """w13 [experts, 2 * width, hidden]: gate over up; w2 [experts, hidden, width]."""
    ranks, hidden = layout.tensor * layout.data, arch.hidden_size
    experts, width, slot = range(arch.num_experts), arch.moe_intermediate_size, 0
    if layout.expert_parallel:
        # The first ranks take a remainder.
        least, rest = divmod(arch.num_experts, ranks)
        start = index * least + min(index, rest)
        experts = range(start, start + least + (index < rest))
    else:
        width, slot = _share(width, ranks, "moe_intermediate_size"), index
    rows = (slot * width, (slot + 1) * width)
    gate_up = tuple(
        ServerPiece(f"{prefix}{expert}.{part}_proj.weight", rows, (0, hidden), (place, half * width, 0))
        for place, expert in enumerate(experts)
        for half, part in enumerate(("gate", "up"))
    )
    down = tuple(
        ServerPiece(f"{prefix}{expert}.down_proj.weight", (0, hidden), rows, (place, 0, 0))
        for place, expert in enumerate(experts)
    )
    yield ServerParameter(f"{prefix}routed_experts.w13_weight", (len(experts), 2 * width, hidden), gate_up)
    yield ServerParameter(f"{prefix}routed_experts.w2_weight", (len(experts), hidden, width), down)


def _whole(name: str, shape: tuple[int] | tuple[int, int]) -> ServerParameter:
    columns = (0, shape[1]) if len(shape) == 2 else None
    return ServerParameter(name, shape, (ServerPiece(name, (0, shape[0]), columns, (0, 0, 0)),))


def _stack(parts: list[tuple[str, int, int]], hidden: int) -> tuple[ServerPiece, ...]:
    """Slices (tensor, height, which of its slices) one below the other."""
    pieces, row = [], 0
    for tensor, height, index in parts:
        pieces.append(ServerPiece(tensor, (index * height, (index + 1) * height), (0, hidden), (0, row, 0)))
        row += height
    return tuple(pieces)


def _columns(name: str, height: int, width: int, index: int) -> ServerParameter:
    piece = ServerPiece(name, (0, height), (index * width, (index + 1) * width), (0, 0, 0))
    return ServerParameter(name, (height, width), (piece,))


def _share(whole: int, parts: int, what: str) -> int:
    if whole % parts:
        raise ValueError(f"{what} ({whole}) cannot be cut into {parts} equal parts; choose another server layout")
    return whole // parts


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
