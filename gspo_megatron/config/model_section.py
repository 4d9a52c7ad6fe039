"""`model`: which model is trained. Each family in `models/` adds its own fields."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from gspo_megatron.config.base import Section
from gspo_megatron.config.recipe_paths import RecipePath


class Architecture(Section):
    """The shape of a decoder, under the names of its Hugging Face `config.json`. Each family has a subclass.

    The fields here are those that code outside a family reads.
    """

    model_type: str
    """Which model it is, as Hugging Face calls it; it decides the family."""
    vocab_size: int = Field(gt=0)
    """Rows of the embedding and of the head, padding rows included."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    num_hidden_layers: int = Field(gt=0, le=512)
    """Decoder layers."""
    num_attention_heads: int = Field(gt=0)
    """Query heads."""
    num_key_value_heads: int = Field(gt=0)
    """Key and value heads (grouped-query attention)."""
    head_dim: int = Field(gt=0)
    """Width of one head."""
    intermediate_size: int = Field(gt=0)
    """Width of a dense feed-forward layer; unused where every layer is a mixture of experts."""
    moe_intermediate_size: int = Field(default=0, ge=0)
    """Width of one expert; 0 for a dense model."""
    num_experts: int = Field(default=0, ge=0, le=1024)
    """Experts a layer; 0 for a dense model."""
    num_experts_per_tok: int = Field(default=0, ge=0)
    """Experts a token is sent to (top-k); 0 for a dense model."""
    norm_topk_prob: bool = False
    """Renormalise the chosen experts' probabilities; says nothing in a dense model.

    Source: transformers' default; every published Qwen3-MoE says true.
    """
    rope_theta: float = Field(default=1e4, gt=0)
    """Base of the rotary embedding. Source: transformers' default; every published model has its own."""
    rope_scaling: dict[str, float | int | str] | None = None
    """Parameters of a scaled rotary embedding as in `config.json`, or null. Source: transformers' default."""
    max_position_embeddings: int = Field(gt=0)
    """Native context, tokens."""
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    """Epsilon of every RMSNorm. Source: transformers' default; Llama 2 and 3 have 1e-5."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of a random initialisation. Source: transformers' default."""
    tie_word_embeddings: bool = False
    """Whether the head is the transposed embedding. Source: transformers' default."""

    @abstractmethod
    def to_hugging_face(self, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM read."""

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Rotary settings as transformers 5 writes them in `config.json`."""
        return {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}

    @model_validator(mode="before")
    @classmethod
    def forget_what_needs_experts(cls, values: Any) -> Any:
        """Two dense models that differ in norm_topk_prob are one model."""
        if isinstance(values, Mapping) and not values.get("num_experts"):
            return {name: value for name, value in values.items() if name != "norm_topk_prob"}
        return values

    @model_validator(mode="after")
    def heads_can_be_rotated(self) -> Architecture:
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: rotary embeddings rotate pairs; choose an even one")
        return self

    @model_validator(mode="after")
    def query_heads_divide_into_groups(self) -> Architecture:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; choose one that is"
            )
        return self


class ModelSection(Section):
    """`model`: which model is trained."""

    path: RecipePath | None = None
    """Hugging Face directory (config.json and safetensors); null = start from random weights of `architecture`."""
    architecture: dict[str, Any] | None = None
    """Shape under the names of a `config.json`; read from `path`/config.json when null. Keys by model_type."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the trainer's and the sampler's weights; log-probs and the router are float32 in either.

    Source: the type in which Qwen3 is published.
    """

    @model_validator(mode="after")
    def a_path_or_an_architecture(self) -> ModelSection:
        if self.path is None and self.architecture is None:
            raise ValueError("neither path nor architecture is set; name a model directory or give an architecture")
        return self
