"""A checksum over the logical (Hugging Face) tensors of a model that can be taken in slices, in any order.

Every value counts as (its bits + 1) * (2 * its position in the tensor + 1) * an odd number made of the tensor's name,
type and shape; all of it is summed modulo 2**64. So the sums of slices add up to that of the whole, whoever takes them
and however they are packed, and a value that is missing, doubled, changed or misplaced shows.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from gspo_megatron.config.model import Architecture
from gspo_megatron.weights.table import hf_shapes

WORDS = {4: torch.int32, 2: torch.int16}
MASK = (1 << 64) - 1
CHUNK = 1 << 22
"""Values summed at a time: bounds the int64 copies to 32 MiB."""


class Rectangle(Protocol):
    """Where a slice lies in its tensor."""

    @property
    def tensor(self) -> str: ...
    @property
    def row(self) -> int: ...
    @property
    def column(self) -> int: ...


class Checksum:
    """Running sums, one for each of several receivers; they stay on the device until `values` is asked for."""

    def __init__(self, arch: Architecture, dtype: torch.dtype, device: torch.device, receivers: int = 1) -> None:
        self._shapes, self._dtype = hf_shapes(arch), dtype
        self._sums = torch.zeros(receivers, dtype=torch.int64, device=device)

    def add(self, receiver: int, part: Rectangle, values: Tensor) -> None:
        """Count in a slice [height, width] of a tensor; a vector is one column."""
        shape = self._shapes[part.tensor]
        width = shape[1] if len(shape) > 1 else 1
        weighted = position_sum(values, part.row * width + part.column, width)
        self._sums[receiver] += weighted * label(part.tensor, str(self._dtype), shape)

    def values(self) -> list[int]:
        """The sums in 0..2**64-1."""
        return [value & MASK for value in self._sums.tolist()]


def position_sum(values: Tensor, first: int, width: int) -> Tensor:
    """Scalar int64: (bits + 1) * (2 * position + 1) over a rectangle [rows, columns] of a tensor of that width.

    `first` is the position of its first value. The weight is split into a row's and a column's part, so that only sums
    of rows and columns are multiplied.
    """
    words = values.detach().view(WORDS[values.element_size()])
    height, columns = words.shape
    step = max(1, CHUNK // columns)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    across = torch.arange(columns, dtype=torch.int64, device=values.device) * 2 + 1
    for start in range(0, height, step):
        part = words[start : start + step].to(torch.int64) + 1
        rows = torch.arange(start, start + len(part), dtype=torch.int64, device=values.device)
        total += (part.sum(0) * across).sum() + (part.sum(1) * (rows * width + first) * 2).sum()
    return total


@cache
def label(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """An odd number of 64 bits, signed as torch holds it."""
    digest = hashlib.blake2b(f"{name} {dtype} {shape}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True) | 1
