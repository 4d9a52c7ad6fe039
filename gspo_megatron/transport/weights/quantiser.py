"""Matrices as fp8 with scales of blocks, quantised by whoever sends them.

The arithmetic is that of `per_block_cast_to_fp8` in vllm 0.32's `utils/deep_gemm.py`, which is what vLLM quantises with
itself (`quantization=fp8_per_block`): scale = largest |value| of the block, at least 1e-4, over 448; byte = value times
1 / scale, rounded to e4m3. Every operation is written as there, so that torch rounds it alike. A test compares bytes
and scales to the bit.

A block may lie on several ranks of the trainer, which cut matrices anywhere. So ranks first agree on the largest value
of every block; from then on each rank encodes any rectangle of what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models import weight_format
from gspo_megatron.models.hf_table import Piece, local_parameters
from gspo_megatron.models.weight_format import SCALE, WeightFormat, is_quantised
from gspo_megatron.parallel import Layout

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
LEAST_MAXIMUM = 1e-4


class BlockScales:
    """The largest value of every block of a model, and what follows from it."""

    def __init__(self, form: WeightFormat, arch: Architecture, device: torch.device) -> None:
        """Start from zeros; `measure` fills in a rank's share."""
        self._arch = arch
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        size = 0
        for name, shape in form.shapes(arch).items():
            if name.endswith(SCALE):
                self._places[name] = (size, shape)
                size += math.prod(shape)
        self.maxima = torch.zeros(size, dtype=torch.float32, device=device)
        """[blocks of the model] of a rank's share, until the ranks have taken the maximum over all of them."""

    @torch.no_grad()
    def measure(self, layout: Layout, rank: int, parameters: Mapping[str, Tensor]) -> None:
        """Take in what a trainer rank holds, under its global Megatron names."""
        at = layout.coordinates(rank)
        for chunk in range(layout.virtual):
            for entry in local_parameters(self._arch, layout, at, chunk):
                for piece in entry.pieces:
                    if is_quantised(piece.tensor) and entry.name in parameters:
                        self._measure(piece, parameters[entry.name][slice(*piece.at)])

    def _measure(self, piece: Piece, values: Tensor) -> None:
        assert piece.columns is not None
        found = block_maxima(values, piece.rows[0], piece.columns[0])
        top, left = piece.rows[0] // weight_format.BLOCK, piece.columns[0] // weight_format.BLOCK
        here = self._of(piece.tensor + SCALE)[top : top + found.shape[0], left : left + found.shape[1]]
        torch.maximum(here, found, out=here)

    def _of(self, name: str) -> Tensor:
        start, shape = self._places[name]
        return self.maxima[start : start + math.prod(shape)].view(shape)

    def scales(self, name: str) -> Tensor:
        """[rows of blocks, columns of blocks] float32: the tensor `...weight_scale_inv`."""
        return scales_of(self._of(name))

    def encode(self, tensor: str, row: int, column: int, values: Tensor) -> Tensor:
        """[height, width] bytes of a rectangle of a tensor, given where it begins there."""
        return encode(values, self.scales(tensor + SCALE), row, column)


def encode(values: Tensor, scales: Tensor, row: int = 0, column: int = 0) -> Tensor:
    """[height, width] bytes of a rectangle of a matrix.

    Args:
        values: [height, width].
        scales: [rows of blocks, columns of blocks] of the whole matrix.
        row: the rectangle's first row in it.
        column: its first column.
    """
    block = weight_format.BLOCK
    height, width = values.shape
    rows = torch.arange(row, row + height, device=values.device) // block
    columns = torch.arange(column, column + width, device=values.device) // block
    return (values * (1.0 / scales)[rows][:, columns]).to(E4M3)


def scales_of(maxima: Tensor) -> Tensor:
    """The scale of a block from its largest |value|."""
    return maxima.clamp(LEAST_MAXIMUM) / E4M3_MAX


def block_maxima(values: Tensor, row: int, column: int) -> Tensor:
    """[rows of blocks, columns of blocks] float32: largest |value| of the part of each block in a rectangle.

    Args:
        values: [height, width] rectangle of a tensor.
        row: its first row there.
        column: its first column there.
    """
    block = weight_format.BLOCK
    height, width = values.shape
    above, before = row % block, column % block
    below, behind = -(above + height) % block, -(before + width) % block
    if above or before or below or behind:
        values = functional.pad(values, (before, behind, above, below))
    height, width = values.shape
    return values.view(height // block, block, width // block, block).abs().float().amax((1, 3))
