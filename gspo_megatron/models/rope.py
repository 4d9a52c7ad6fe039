"""Scaled rotary embeddings: how megatron-core computes them, and which settings trainer and servers read alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.types import Finding

YARN_KEYS = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
"""What both engines read in the same way."""
LLAMA3_VALUES = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""What megatron-core 0.19 computes llama3 with, whatever a model says (`RotaryEmbedding._apply_scaling`).

Source: config.json of Llama 3.1, 3.2 and 3.3.
"""
KEY = "model.architecture.rope_scaling"


def rope_type_of(scaling: Mapping[str, Any]) -> Any:
    """The kind of scaling, in either of the two spellings."""
    return scaling.get("rope_type", scaling.get("type"))


def megatron_rope(arch: Architecture) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Arguments of `GPTModel`, attributes of the configuration) for the rotary embedding of a model."""
    scaling = arch.rope_scaling
    if not scaling:
        return {"position_embedding_type": "rope"}, {}
    if rope_type_of(scaling) == "llama3":
        factor = float(scaling["factor"])
        return {"position_embedding_type": "rope", "rope_scaling": True, "rope_scaling_factor": factor}, {}
    return {"position_embedding_type": "yarn"}, _yarn_attributes(scaling)


def _yarn_attributes(scaling: Mapping[str, Any]) -> dict[str, Any]:
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


def scaling_findings(arch: Architecture, rope_types: tuple[str, ...]) -> Iterator[Finding]:
    """Settings of `rope_scaling` that trainer and servers would not compute alike.

    Args:
        arch: the model.
        rope_types: kinds of scaling that its family runs with.
    """
    scaling = arch.rope_scaling
    if not scaling:
        return
    kind = rope_type_of(scaling)
    if kind not in rope_types:
        yield _differs(
            f"rope_type={kind}: the servers would apply it, the trainer only knows {' and '.join(rope_types)}",
            f"set rope_type={rope_types[-1]} with factor and original_max_position_embeddings, or null",
        )
    for name in ("factor", "original_max_position_embeddings"):
        if not isinstance(scaling.get(name), int | float):
            yield _differs(
                f"{name} is {scaling.get(name, 'missing')}: each engine would fill in its own",
                f"set {name}, as in the model's config.json",
            )
    if kind == "llama3":
        for name, value in LLAMA3_VALUES.items():
            if scaling.get(name) != value:
                yield _differs(
                    f"{name}={scaling.get(name, 'missing')}: the trainer computes llama3 with {value} only",
                    f"set {name}={value} if the weights allow it",
                )
    known = {"rope_type", "type", *(LLAMA3_VALUES.keys() | {"factor"} if kind == "llama3" else YARN_KEYS)}
    for name in sorted(set(scaling) - known):
        yield _differs(f"{name}={scaling[name]} is read by the servers and not by the trainer", f"remove {name}")


def _differs(message: str, fix: str) -> Finding:
    return Finding("yarn-differs", "error", KEY, message, fix)
