"""Rotary embedding of a whole pack in one call.

Unfused, megatron-core rotates one sequence after another in every layer, and asks the device for their lengths each
time. Here the positions of all tokens are known before the first layer: cosines and sines are gathered once a forward
pass, and a layer multiplies. Transformer Engine's fused kernel does the same on its own; where it is on
(`apply_rope_fusion`), nothing is changed here. It lacks YaRN's factor, and does not know which ranks share a pack.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class PackedModel(GPTModel):
    """`GPTModel`; its layers get cosines and sines, one row a token, and no table of angles by position."""

    def _preprocess(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        prepared: tuple[Any, ...] = super()._preprocess(*args, packed_seq_params=packed_seq_params, **kwargs)
        hidden, angles, *rest = prepared
        if not self.config.apply_rope_fusion:
            factor = _yarn_get_concentration_factor_from_config(self.config)
            angles = rotations(angles, packed_seq_params.positions, factor, self.config.params_dtype)
        return hidden, angles, *rest


class PackedSelfAttention(SelfAttention):
    """`SelfAttention` with the rotation of `PackedModel`."""

    # megatron's own arguments, named one by one there
    def _adjust_key_value_for_inference(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: Any, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb: Any, *rest: Any
    ) -> tuple[Any, ...]:
        """Rotate here: megatron calls this just before it would, and rotates only by what is returned."""
        if not self.config.apply_rope_fusion:
            rotation, rotary_pos_emb = rotary_pos_emb[0], None
            query, key = rotate(query, rotation), rotate(key, rotation)
        return super()._adjust_key_value_for_inference(context, query, key, value, rotary_pos_emb, *rest)


def rotations(angles: Tensor, positions: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """[2, T, 1, 1, d] cosines and sines.

    Args:
        angles: [longest, 1, 1, d] of each position in a sequence, in radians.
        positions: [T] int64, of each token in its own sequence.
        factor: of YaRN, 1 without; both are multiplied by it.
        dtype: of the result.
    """
    own = angles.index_select(0, positions)
    return torch.stack([(torch.cos(own) * factor).to(dtype), (torch.sin(own) * factor).to(dtype)])


def rotate(tokens: Tensor, rotation: Tensor) -> Tensor:
    """[T, 1, heads, d] tokens, each pair (i, i + d/2) of its values turned by its token's angle."""
    cosine, sine = rotation
    first, second = tokens.chunk(2, dim=-1)
    return tokens * cosine + torch.cat((-second, first), dim=-1) * sine
