"""The tensors of a Hugging Face checkpoint as a list, for whole-tensor exports."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gspo_megatron.types import ITEM_BYTES


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """One logical (Hugging Face) tensor."""

    name: str
    """`model.layers.0.self_attn.q_proj.weight`"""
    dtype: str
    """A key of `ITEM_BYTES`: `float32`."""
    shape: tuple[int, ...]
    """`(128, 128)`"""

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]
