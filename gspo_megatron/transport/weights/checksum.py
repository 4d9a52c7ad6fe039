"""A checksum over the logical (Hugging Face) tensors of a model that can be taken in slices, in any order.

Every value counts as (its bits + 1) * (2 * its position in the tensor + 1) * an odd number made of the tensor's name,
type and shape; all of it is summed modulo 2**64. So the sums of slices add up to that of the whole, whoever takes them
and however they are packed, and a value that is missing, doubled, changed or misplaced shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.vllm_layout import ServerParameter, ServerPiece
from gspo_megatron.models.weight_format import WeightFormat
from gspo_megatron.transport.weights.plan import Slice

WORDS = {4: torch.int32, 2: torch.int16, 1: torch.int8}
MASK = (1 << 64) - 1
CHUNK = 1 << 22
"""Values summed at a time, as far as whole slices or rows allow: bounds the int64 copies to about 32 MiB."""


class Checksum:
    """Running sums, one for each of several receivers; they stay on the device until `values` is called."""

    def __init__(self, arch: Architecture, form: WeightFormat, device: torch.device, receivers: int = 1) -> None:
        self._shapes = form.shapes(arch)
        self._sums = torch.zeros(receivers, dtype=torch.int64, device=device)

    def add(self, receiver: int, parts: Sequence[Slice | ServerPiece], values: Tensor) -> None:
        """Count in slices [slices, height, width] of tensors; a vector is one column."""
        shapes = [self._shapes[part.tensor] for part in parts]
        widths = [shape[1] if len(shape) > 1 else 1 for shape in shapes]
        firsts = [part.row * width + part.column for part, width in zip(parts, widths, strict=True)]
        labels = [label(part.tensor, str(values.dtype), shape) for part, shape in zip(parts, shapes, strict=True)]
        facts = torch.tensor([firsts, widths, labels], dtype=torch.int64).to(values.device)
        step = max(1, CHUNK // max(values[0].numel(), 1))
        for start in range(0, len(values), step):
            first, width, factor = facts[:, start : start + step]
            self._sums[receiver] += (position_sums(values[start : start + step], first, width) * factor).sum()

    def values(self) -> list[int]:
        """The sums in 0..2**64-1."""
        return [value & MASK for value in self._sums.tolist()]


def position_sums(values: Tensor, first: Tensor, width: Tensor) -> Tensor:
    """[slices] int64: (bits + 1) * (2 * position + 1) over each slice of values [slices, height, width].

    Args:
        values: as they lie in their tensors.
        first: [slices] position of a slice's first value in its tensor.
        width: [slices] columns of the tensor.

    The weight is split into a row's and a column's part, so that only sums of rows and columns are multiplied.
    """
    words = values.detach().view(WORDS[values.element_size()])
    _, height, columns = words.shape
    step = max(1, CHUNK // columns)
    total = torch.zeros(len(words), dtype=torch.int64, device=values.device)
    across = torch.arange(columns, dtype=torch.int64, device=values.device) * 2 + 1
    for start in range(0, height, step):
        part = words[:, start : start + step].to(torch.int64) + 1
        rows = torch.arange(start, start + part.shape[1], dtype=torch.int64, device=values.device)
        total += (part.sum(1) * across).sum(1)
        total += (part.sum(2) * (rows * width[:, None] + first[:, None]) * 2).sum(1)
    return total


@cache
def label(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """An odd number of 64 bits, signed as torch holds it."""
    digest = hashlib.blake2b(f"{name} {dtype} {shape}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True) | 1


def plane(parameter: Tensor, part: Slice | ServerPiece) -> Tensor:
    """The rectangle of a parameter that a slice or piece names, [height, width], as a view."""
    expert, row, column = part.at
    matrix = parameter[expert] if parameter.dim() == 3 else parameter if parameter.dim() == 2 else parameter[:, None]
    return matrix[row : row + part.height, column : column + part.width]


def add_parameter(checksum: Checksum, parameter: ServerParameter, values: Tensor) -> None:
    """Count in all that an assembled parameter holds of the model; pieces of one shape (experts) at once."""
    for _, alike in groupby(parameter.pieces, key=lambda piece: (piece.height, piece.width)):
        pieces = list(alike)
        if values.dim() == 3 and sum(piece.size for piece in pieces) == values.numel():
            # They fill it in their order: no copy.
            checksum.add(0, pieces, values.view(len(pieces), -1, values.shape[-1]))
        else:
            for piece in pieces:
                checksum.add(0, [piece], plane(values, piece)[None])
