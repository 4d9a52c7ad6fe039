"""How the ranks of a vLLM server hold a parameter: fused, cut and padded, as plain arithmetic.

Derived from vLLM's sharding rules and not recorded from a live server: the planner needs it before a server runs, and
in trainer processes, which cannot import vllm. A family's server layers are written with these functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gspo_megatron.config.model_section import Architecture

VOCABULARY_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this before it cuts it (`DEFAULT_VOCAB_PADDING_SIZE`)."""
EXPERT_TILE = 128
"""vLLM 0.32's experts on Blackwell (FlashInfer's TRT-LLM) pad the width that a rank holds to a multiple of this."""


def pad_experts(width: int) -> int:
    """What those kernels make of a width. Source: vLLM's `fused_moe/oracle/unquantized.py`."""
    return -(-width // EXPERT_TILE) * EXPERT_TILE


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
    expert_width: int = 0
    """Intermediate columns of an expert on a rank where kernels pad them (`pad_experts`); 0 = they do not."""

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


def hold_vocabulary(arch: Architecture, name: str, layout: ServerLayout, tensor: int) -> ServerParameter:
    """Rows of the embedding or of the head, padded."""
    padded = -(-arch.vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING
    part = share_of(padded, layout.tensor, "the padded vocabulary")
    rows = (min(tensor * part, arch.vocab_size), min((tensor + 1) * part, arch.vocab_size))
    pieces = (ServerPiece(name, rows, (0, arch.hidden_size), (0, 0, 0)),) if rows[0] < rows[1] else ()
    return ServerParameter(name, (part, arch.hidden_size), pieces)


def hold_whole(name: str, shape: tuple[int] | tuple[int, int]) -> ServerParameter:
    """A parameter that every rank of the server holds."""
    columns = (0, shape[1]) if len(shape) == 2 else None
    return ServerParameter(name, shape, (ServerPiece(name, (0, shape[0]), columns, (0, 0, 0)),))


def hold_qkv(
    arch: Architecture, prefix: str, layout: ServerLayout, tensor: int, kinds: Sequence[str] = ("weight",)
) -> Iterator[ServerParameter]:
    """The fused projection of queries, keys and values: its weight, and its bias where `kinds` names it.

    Args:
        arch: the model.
        prefix: in front of `qkv_proj`, and of `q_proj` in the Hugging Face names.
        layout: of the server.
        tensor: position among its tensor-parallel ranks.
        kinds: `weight`, `bias`.
    """
    head = arch.head_dim
    queries = share_of(arch.num_attention_heads, layout.tensor, "num_attention_heads") * head
    groups, copies = arch.num_key_value_heads, 1
    if layout.tensor > groups:
        # A head that does not divide is held by several ranks.
        copies = share_of(layout.tensor, groups, "tensor-parallel ranks over num_key_value_heads")
    keys = share_of(groups * copies, layout.tensor, "num_key_value_heads") * head
    for kind in kinds:
        hidden = arch.hidden_size if kind == "weight" else None
        pieces = stack(
            [
                (f"{prefix}q_proj.{kind}", queries, tensor),
                (f"{prefix}k_proj.{kind}", keys, tensor // copies),
                (f"{prefix}v_proj.{kind}", keys, tensor // copies),
            ],
            hidden,
        )
        height = queries + 2 * keys
        yield ServerParameter(f"{prefix}qkv_proj.{kind}", (height,) if hidden is None else (height, hidden), pieces)


def hold_attention_output(arch: Architecture, prefix: str, layout: ServerLayout, tensor: int) -> ServerParameter:
    """The projection behind attention, cut by its heads."""
    width = share_of(arch.num_attention_heads, layout.tensor, "num_attention_heads") * arch.head_dim
    return hold_columns(prefix + "o_proj.weight", arch.hidden_size, width, tensor)


def hold_gated_mlp(arch: Architecture, prefix: str, layout: ServerLayout, tensor: int) -> Iterator[ServerParameter]:
    """A dense feed-forward layer: gate over up, and the product back."""
    hidden, width = arch.hidden_size, share_of(arch.intermediate_size, layout.tensor, "intermediate_size")
    both = [(f"{prefix}{part}_proj.weight", width, tensor) for part in ("gate", "up")]
    yield ServerParameter(prefix + "gate_up_proj.weight", (2 * width, hidden), stack(both, hidden))
    yield hold_columns(prefix + "down_proj.weight", hidden, width, tensor)


def stack(parts: Sequence[tuple[str, int, int]], hidden: int | None) -> tuple[ServerPiece, ...]:
    """Slices (tensor, height, which of its slices) one below the other; `hidden` columns, None for vectors."""
    pieces, row = [], 0
    columns = None if hidden is None else (0, hidden)
    for tensor, height, index in parts:
        pieces.append(ServerPiece(tensor, (index * height, (index + 1) * height), columns, (0, row, 0)))
        row += height
    return tuple(pieces)


def hold_columns(name: str, height: int, width: int, index: int) -> ServerParameter:
    """Columns of a matrix, `width` of them, from the `index`-th slice."""
    piece = ServerPiece(name, (0, height), (index * width, (index + 1) * width), (0, 0, 0))
    return ServerParameter(name, (height, width), (piece,))


def share_of(whole: int, parts: int, what: str) -> int:
    """An equal part. Raises ValueError naming `what` does not divide."""
    if whole % parts:
        raise ValueError(f"{what} ({whole}) cannot be cut into {parts} equal parts; choose another server layout")
    return whole // parts
