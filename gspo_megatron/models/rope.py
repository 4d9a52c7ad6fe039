"""Scaled rotary embeddings: how megatron-core computes them, and which settings trainer and servers read alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.refusal import quote
from gspo_megatron.types import Finding

Faults = list[Finding]
KEYS = frozenset(
    {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"}
)
"""Every key of a `config.json` that changes the rotary embedding; max_position_embeddings is one too."""
DEFAULT_THETA = 10_000.0
"""transformers' `default_theta`, in every family."""
WITH_ORIGINAL = ("yarn", "llama3", "longrope")
"""Kinds for which transformers fills in original_max_position_embeddings."""
YARN_KEYS = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
"""Keys that transformers, megatron and vLLM read in the same way."""
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "attention_factor": (None,), "truncate": (True,), "mscale": (None, 0), "mscale_all_dim": (None, 0),
    "beta_fast": (None, 0), "beta_slow": (None, 0),
}  # fmt: skip
"""Values with which transformers computes YaRN as if the key were absent."""
LLAMA3_VALUES = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""What megatron-core 0.19 computes llama3 with, whatever a model says (`RotaryEmbedding._apply_scaling`).

Source: config.json of Llama 3.1, 3.2 and 3.3.
"""
KEY = "model.architecture.rope_scaling"


def megatron_rope(arch: Architecture) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Arguments of `GPTModel`, attributes of the configuration) for the rotary embedding of a model."""
    scaling = arch.rope_scaling
    if not scaling:
        return {"position_embedding_type": "rope"}, {}
    if scaling["rope_type"] == "llama3":
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


def read_rope(values: Mapping[str, Any], native: Any, rope_types: tuple[str, ...]) -> tuple[dict[str, Any], Faults]:
    """The fields `rope_theta` and `rope_scaling` of an architecture, as transformers takes them from a configuration.

    Args:
        values: the keys of KEYS that were given.
        native: max_position_embeddings.
        rope_types: kinds of scaling that the family runs with.

    Returns:
        The fields, and what trainer and servers would not compute as transformers does.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        return {}, [_differs(f"{quote(given)} is no mapping", "write keys and values, or null")]
    parameters = dict(given)
    theta = parameters.pop("rope_theta", values.get("rope_theta", DEFAULT_THETA))
    spelled = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", spelled)
    # At 1 YaRN divides by the logarithm of it; far below, the angles are beyond a float.
    whole = _is_number(theta) and theta > 1
    faults = [] if whole else [_differs(f"rope_theta={quote(theta)} is no number above 1", "set it")]
    faults += _partial_faults(values.get("partial_rotary_factor"), parameters)
    if kind == "default":
        faults += [
            _differs(f"{name}={quote(parameters[name])} has no effect with rope_type=default", f"remove {name}")
            for name in sorted(set(parameters) - {name for name, value in parameters.items() if value is None})
        ]
        return {"rope_theta": theta, "rope_scaling": None}, faults
    if kind in WITH_ORIGINAL:
        parameters.setdefault("original_max_position_embeddings", native)
        # A key of this name beside the others wins, as in transformers.
        if "original_max_position_embeddings" in values:
            parameters["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    scaling = {name: value for name, value in parameters.items() if value not in NO_EFFECT.get(name, ())}
    faults += _scaling_faults(kind, scaling, rope_types)
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **scaling}}, faults


def _partial_faults(beside: Any, parameters: dict[str, Any]) -> Faults:
    """A rotary embedding of a part of the head; the key is taken out of the parameters."""
    inside = parameters.pop("partial_rotary_factor", 1.0)
    for value in (inside, 1.0 if beside is None else beside):
        if value != 1 or isinstance(value, bool):
            return [_differs(f"partial_rotary_factor={quote(value)}: the trainer rotates whole heads", "set it to 1")]
    return []


def _scaling_faults(kind: Any, scaling: Mapping[str, Any], rope_types: tuple[str, ...]) -> Faults:
    """What trainer and servers would compute otherwise of a scaled embedding."""
    if kind not in rope_types:
        return [
            _differs(
                f"rope_type={quote(kind)}: the trainer computes {' and '.join(rope_types)} only",
                f"set rope_type={rope_types[-1]} with factor and original_max_position_embeddings, or null",
            )
        ]
    faults = [
        _differs(
            f"{name} is {_shown(scaling, name)}: {words} is needed", f"set {name}, as in the model's config.json"
        )
        for name, words, fits in (
            ("factor", "a number above 0", _is_number),
            ("original_max_position_embeddings", "a whole number above 0", _is_whole),
        )
        if not fits(scaling.get(name))
    ]  # fmt: skip
    fixed = LLAMA3_VALUES if kind == "llama3" else {}
    faults += [
        _differs(
            f"{name}={_shown(scaling, name)}: the trainer computes llama3 with {value} only",
            f"set {name}={value} if the weights allow it",
        )
        for name, value in fixed.items()
        if scaling.get(name) != value
    ]
    for name in sorted(scaling.keys() - {"factor"} - fixed.keys()):
        if name not in YARN_KEYS or fixed:
            faults.append(_differs(f"{name}={quote(scaling[name])}: the trainer does not compute it", f"remove {name}"))
        elif not _is_number(scaling[name]):
            faults.append(_differs(f"{name}={quote(scaling[name])} is no number above 0", f"set or remove {name}"))
    return faults


def _shown(scaling: Mapping[str, Any], name: str) -> str:
    return quote(scaling[name]) if name in scaling else "missing"


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _differs(message: str, fix: str) -> Finding:
    return Finding("rope-differs", "error", KEY, message, fix)
