"""Which families run, found by the `model_type` of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.refusal import quote
from gspo_megatron.models.family import Family
from gspo_megatron.models.llama import LLAMA
from gspo_megatron.models.qwen3 import QWEN3

FAMILIES = (QWEN3, LLAMA)
BY_TYPE: dict[str, Family] = {model_type: family for family in FAMILIES for model_type in family.architectures}
DEFAULT_TYPE = "qwen3_moe"
"""Of an architecture that names none. Source: what the first recipes here train."""


def family_of(arch: Architecture) -> Family:
    """The family of a model."""
    return BY_TYPE[arch.model_type]


def architecture_class(model_type: object = DEFAULT_TYPE) -> type[Architecture]:
    """The class of keys of a `model_type`. Raises ValueError, with those that run, for another one."""
    if not isinstance(model_type, str) or model_type not in BY_TYPE:
        runs = "; ".join(f"{family.name}: {', '.join(family.architectures)}" for family in FAMILIES)
        raise ValueError(f"model_type={quote(model_type)} is no model that runs here; choose one of {runs}")
    return BY_TYPE[model_type].architectures[model_type]


def architecture_of(values: Mapping[str, Any]) -> Architecture:
    """The typed architecture of a complete mapping. Raises ValueError, of which pydantic's ValidationError is one."""
    return architecture_class(values.get("model_type")).model_validate(values)
