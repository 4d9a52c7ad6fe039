"""What the model is: the keys of a Hugging Face `config.json`, typed, and where its weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from gspo_megatron.config.base import Section


class Architecture(Section):
    """A Qwen3 or Qwen3-MoE model, under the names of its Hugging Face `config.json`."""

    model_type: Literal["qwen3_moe", "qwen3"] = "qwen3_moe"
    """`qwen3_moe` = every layer a mixture of experts; `qwen3` = dense. Source: what the recipes here train."""
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
    """Width of one expert."""
    num_experts: int = Field(default=0, ge=0, le=1024)
    """Experts a layer; 0 for a dense model."""
    num_experts_per_tok: int = Field(default=0, ge=0)
    """Experts a token is sent to (top-k)."""
    norm_topk_prob: bool = True
    """Renormalise the chosen experts' probabilities. transformers' class default is false, the models say true.

    Source: config.json of Qwen3-30B-A3B and 235B-A22B.
    """
    rope_theta: float = Field(default=1e6, gt=0)
    """Base of the rotary embedding. Source: config.json of the Qwen3 releases; the 2507 ones have 1e7 and 5e6."""
    rope_scaling: dict[str, float | int | str] | None = None
    """YaRN parameters as in `config.json`, or null."""
    max_position_embeddings: int = Field(gt=0)
    """Native context, tokens."""
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    """Epsilon of every RMSNorm. Source: config.json of every Qwen3."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of a random initialisation. Source: config.json of every Qwen3."""
    tie_word_embeddings: bool = False
    """Whether the head is the transposed embedding."""

    def to_hugging_face(self, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM read."""
        values = self.model_dump(exclude={"rope_theta", "rope_scaling"}, exclude_defaults=False)
        rope: dict[str, Any] = {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}
        name = "Qwen3MoeForCausalLM" if self.num_experts else "Qwen3ForCausalLM"
        return {"architectures": [name], **values, "rope_parameters": rope, "dtype": dtype, "hidden_act": "silu"}

    @model_validator(mode="after")
    def experts_fit_the_model_type(self) -> Architecture:
        if self.model_type == "qwen3" and self.num_experts:
            raise ValueError(
                f"num_experts={self.num_experts} with model_type=qwen3; use model_type=qwen3_moe or num_experts=0"
            )
        if self.model_type == "qwen3_moe" and not 0 < self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is not in 1..num_experts={self.num_experts}; set both"
            )
        if self.model_type == "qwen3_moe" and not self.moe_intermediate_size:
            raise ValueError("moe_intermediate_size=0 leaves the experts empty; set it")
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

    path: Path | None = None
    """Hugging Face directory (config.json and safetensors); null = start from random weights of `architecture`."""
    architecture: Architecture | None = None
    """Typed shape; read from `path`/config.json when null."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the trainer's and the sampler's weights; log-probs and the router are float32 in either.

    Source: the type in which Qwen3 is published.
    """

    @model_validator(mode="after")
    def a_path_or_an_architecture(self) -> ModelSection:
        if self.path is None and self.architecture is None:
            raise ValueError("neither path nor architecture is set; name a model directory or give an architecture")
        return self
