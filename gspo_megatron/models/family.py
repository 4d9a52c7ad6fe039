"""The record of a model family; code outside `models/` reads families only through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.config_keys import ConfigKeys
from gspo_megatron.models.layer_costs import LayerShape
from gspo_megatron.models.server_cuts import ServerLayout, ServerParameter
from gspo_megatron.models.trainer_cuts import Parameter
from gspo_megatron.parallel import Coordinates, Layout


@dataclass(frozen=True, slots=True)
class MegatronSettings:
    """How megatron-core builds the model, as plain values: this package imports neither torch nor megatron."""

    transformer: dict[str, Any]
    """Arguments of `TransformerConfig`."""
    model: dict[str, Any]
    """Arguments of `GPTModel`."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Attributes that megatron reads from the configuration but that are no arguments of it."""


@dataclass(frozen=True, slots=True)
class Family:
    """One folder of `models/`."""

    name: str
    """Of the folder."""
    architectures: Mapping[str, type[Architecture]]
    """The class of keys for each `model_type` that runs."""
    config_keys: Mapping[str, ConfigKeys]
    """The table of its keys of a `config.json` for each `model_type`."""
    rope_types: tuple[str, ...]
    """Kinds of `rope_scaling` that run; the last is the one to set instead of another."""
    layer_shapes: Callable[[Architecture, int], Iterator[tuple[str, tuple[int, ...]]]]
    """Name and full shape of every Hugging Face tensor of a layer, in file order."""
    layer_parameters: Callable[[Architecture, Layout, Coordinates, int], Iterator[Parameter]]
    """What the trainer rank at these coordinates holds of a layer."""
    server_layer: Callable[[Architecture, ServerLayout, int, int, int], Iterator[ServerParameter]]
    """What a server's rank holds of a layer: (model, layout, layer, data rank, tensor rank)."""
    megatron_settings: Callable[[Architecture], MegatronSettings]
    """How megatron-core builds it."""
    layer_products: Callable[[Architecture], int]
    """Multiply-adds of one token in the matrix products of a layer, attention scores apart."""
    attention_bytes: Callable[[LayerShape], int]
    """Bytes that attention saves for the backward pass."""
    mixer_bytes: Callable[[LayerShape, float], int]
    """Bytes that the feed-forward part saves: (layer, rows of the fullest expert rank over the mean)."""
    mixer_work: Callable[[LayerShape, float], float]
    """Values that come and go in the feed-forward part while it works, with the same arguments."""
