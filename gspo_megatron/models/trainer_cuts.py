"""How the trainer's tensor-parallel ranks cut a parameter: the rectangles of Hugging Face tensors that each holds.

Every Megatron parameter is described by the pieces of Hugging Face tensors it is made of: which rows and columns of
which tensor land in which of its rows. A family's weight table is written with these functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gspo_megatron.config.model_section import Architecture


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


def whole(name: str, tensor: str, shape: tuple[int, ...]) -> Parameter:
    """A parameter that every rank holds."""
    rows = (0, shape[0])
    columns = (0, shape[1]) if len(shape) > 1 else None
    return Parameter(name, shape, (Piece(tensor, rows, columns, rows),))


def cut_rows(name: str, tensor: str, height: int, width: int, index: int, count: int) -> Parameter:
    """Rows of a matrix over `count` ranks; this is the part of rank `index`."""
    part = height // count
    rows = (index * part, (index + 1) * part)
    return Parameter(name, (part, width), (Piece(tensor, rows, (0, width), (0, part)),))


def cut_columns(
    name: str, tensor: str, height: int, width: int, index: int, count: int, expert: bool = False
) -> Parameter:
    """Columns of a matrix over `count` ranks; this is the part of rank `index`."""
    part = width // count
    piece = Piece(tensor, (0, height), (index * part, (index + 1) * part), (0, height))
    return Parameter(name, (height, part), (piece,), expert)


def cut_qkv(name: str, prefix: str, arch: Architecture, index: int, count: int, kind: str = "weight") -> Parameter:
    """Rows of one key-value group lie together: its queries, then its key, then its value; TP cuts them evenly.

    With more ranks than groups the cuts fall inside a group, even inside a head: no row is held twice. Megatron gathers
    the product over the tensor-parallel ranks and each rank picks its queries and their group's key and value.

    Args:
        name: of the fused parameter.
        prefix: Hugging Face's, in front of `q_proj`.
        arch: the model.
        index: position among the tensor-parallel ranks.
        count: tensor-parallel ranks.
        kind: `weight` or `bias`; a bias is cut like the rows of its weight.
    """
    head = arch.head_dim
    columns = (0, arch.hidden_size) if kind == "weight" else None
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
                pieces.append(Piece(f"{prefix}{tensor}.{kind}", source, columns, at))
            row += height
    return Parameter(name, (part,) if columns is None else (part, arch.hidden_size), tuple(pieces))


def cut_gated_mlp(
    name: str, prefix: str, hidden: int, width: int, index: int, count: int, expert: bool = False
) -> Iterator[Parameter]:
    """Gate and up projections share one parameter; each is cut first, then they are stacked."""
    part = width // count
    rows = (index * part, (index + 1) * part)
    pieces = tuple(
        Piece(f"{prefix}{tensor}.weight", rows, (0, hidden), (slot * part, (slot + 1) * part))
        for slot, tensor in enumerate(("gate_proj", "up_proj"))
    )
    yield Parameter(name + "linear_fc1.weight", (2 * part, hidden), pieces, expert)
    yield cut_columns(name + "linear_fc2.weight", prefix + "down_proj.weight", hidden, width, index, count, expert)
