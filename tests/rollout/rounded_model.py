"""A model as servers in fp8 have it: each matrix rounded to bytes and scales of blocks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gspo_megatron.models.weight_format import BLOCK, is_quantised
from gspo_megatron.transport.weights.quantiser import block_maxima, encode, scales_of

NEEDS_AVX512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="vLLM's CPU kernels for blocks of fp8 need AVX-512, which this processor does not have",
)


def round_matrix(name: str, weight: Tensor) -> Tensor:
    """The tensor as a server in fp8 has it, byte times scale, float32."""
    if not is_quantised(name):
        return weight.float()
    scales, (height, width) = scales_of(block_maxima(weight, 0, 0)), weight.shape
    return encode(weight, scales).float() * torch.kron(scales, torch.ones(BLOCK, BLOCK))[:height, :width]


def write_model(source: Path, place: Path, tensors: dict[str, Tensor]) -> Path:
    """A directory of the model with these values in float32."""
    place.mkdir()
    shutil.copy(source / "config.json", place)
    values = {name: value.float().contiguous() for name, value in tensors.items()}
    save_file(values, place / "model.safetensors", {"format": "pt"})
    return place
