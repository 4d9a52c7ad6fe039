"""Checksums of a weight update see what matters and nothing else."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from gspo_megatron.models.vllm_layout import ServerLayout, server_parameters
from gspo_megatron.models.weight_format import WeightFormat
from gspo_megatron.transport.weights import checksum as checksums
from gspo_megatron.transport.weights.checksum import Checksum, add_parameter, plane
from gspo_megatron.transport.weights.plan import Slice
from tests.shards import ARCH, CPU, make_tensors

GATE = "model.layers.1.mlp.gate.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def rectangle_of(name: str, value: torch.Tensor, rows: slice, columns: slice) -> tuple[Slice, torch.Tensor]:
    matrix = value if value.dim() > 1 else value[:, None]
    part = matrix[rows, columns]
    return Slice(name, rows.start, columns.start, *part.shape, parameter=name, at=(0, rows.start, columns.start)), part


def whole(name: str, value: torch.Tensor) -> list[tuple[Slice, torch.Tensor]]:
    return [rectangle_of(name, value, slice(0, len(value)), slice(0, value.shape[-1] if value.dim() > 1 else 1))]


def tiles(name: str, value: torch.Tensor, height: int, width: int) -> list[tuple[Slice, torch.Tensor]]:
    edges = product(range(0, len(value), height), range(0, value.shape[1] if value.dim() > 1 else 1, width))
    return [rectangle_of(name, value, slice(row, row + height), slice(column, column + width)) for row, column in edges]


FORM = WeightFormat("float32")


def checksum_of(parts: list[tuple[Slice, torch.Tensor]]) -> int:
    checksum = Checksum(ARCH, FORM, CPU)
    for part, values in parts:
        checksum.add(0, [part], values[None])
    return checksum.values()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_slices_in_any_order_sum_up_to_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_tensors(dtype)
    names = [GATE, O_PROJ, NORM]
    value = checksum_of([part for name in names for part in whole(name, tensors[name])])
    parts = [part for name in names for part in tiles(name, tensors[name], 4, 32)]
    random.Random(0).shuffle(parts)
    assert checksum_of(parts) == value
    monkeypatch.setattr(checksums, "CHUNK", 70)
    assert checksum_of(parts) == value


@pytest.mark.parametrize("chunk", [1 << 22, 5000, 100])
def test_slices_of_one_shape_count_together_as_they_count_alone(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "CHUNK", chunk)
    for parameter in server_parameters(ARCH, ServerLayout(2), 1):
        values = torch.randn(parameter.shape)
        together, alone = Checksum(ARCH, FORM, CPU), Checksum(ARCH, FORM, CPU)
        add_parameter(together, parameter, values)
        for piece in parameter.pieces:
            alone.add(0, [piece], plane(values, piece)[None])
        assert together.values() == alone.values() != [0]


def test_the_checksum_of_one_matrix_by_hand() -> None:
    part = Slice(O_PROJ, 2, 3, 1, 2, O_PROJ, (0, 2, 3))  # positions 2 * 128 + 3 and one on
    values = torch.tensor([[5, 7]], dtype=torch.int32).view(torch.float32)
    expected = (6 * (2 * 259 + 1) + 8 * (2 * 260 + 1)) * checksums.label(O_PROJ, "torch.float32", (64, 128))
    assert checksum_of([(part, values)]) == expected % 2**64


def test_everything_else_matters() -> None:
    tensors = make_tensors()
    first, second = tensors[O_PROJ], tensors[GATE]
    rest = whole(GATE, second)
    changed, swapped, zeros = first.clone(), first.clone(), torch.zeros_like(first)
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(100.0))
    swapped[0, 0], swapped[2, 3] = first[2, 3], first[0, 0]
    other_name = O_PROJ.replace("layers.1", "layers.2")
    variants = [
        whole(O_PROJ, first) + rest,
        whole(O_PROJ, changed) + rest,
        whole(O_PROJ, swapped) + rest,
        whole(O_PROJ, zeros) + rest,
        rest,
        whole(O_PROJ, first),
        whole(other_name, first) + rest,
        whole(O_PROJ, first) + rest + rest,
        whole(O_PROJ, -first) + rest,
        [*tiles(O_PROJ, first, 32, 128)[:1], (tiles(O_PROJ, first, 32, 128)[1][0], first[:32]), *rest],
        whole(O_PROJ, first.flip(0)) + rest,
    ]
    values = [checksum_of(parts) for parts in variants]
    assert len(set(values)) == len(values)
