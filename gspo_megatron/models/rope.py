"""Scaled rotary embeddings: how megatron-core computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def yarn_attributes(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron reads YaRN from attributes of the configuration; the sampler reads the values in `config.json`."""
    return {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": float(scaling["factor"]),
        "yarn_original_max_position_embeddings": int(scaling["original_max_position_embeddings"]),
        "yarn_beta_fast": float(scaling.get("beta_fast", 32)),
        "yarn_beta_slow": float(scaling.get("beta_slow", 1)),
        "yarn_mscale": 1.0,
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": True,
    }
