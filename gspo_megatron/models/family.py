"""What a model family says about itself, in one record; everything outside `models/` reads families through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gspo_megatron.config.model_section import Architecture
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
    only_values: Mapping[str, Any]
    """Keys of a `config.json` that run with one value only, with that value."""
    layer_shapes: Callable[[Architecture, int], Iterator[tuple[str, tuple[int, ...]]]]
    """Name and full shape of every Hugging Face tensor of a layer, in file order."""
    layer_parameters: Callable[[Architecture, Layout, Coordinates, int], Iterator[Parameter]]
    """What the trainer rank at these coordinates holds of a layer."""
    server_layer: Callable[[Architecture, ServerLayout, int, int, int], Iterator[ServerParameter]]
    """What a server's rank holds of a layer: (model, layout, layer, data rank, tensor rank)."""
    megatron_settings: Callable[[Architecture], MegatronSettings]
    """How megatron-core builds it."""
