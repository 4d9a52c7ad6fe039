"""The keys of a Qwen3 `config.json`, typed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from gspo_megatron.config.model_section import Architecture

ONLY_VALUES = {
    "attention_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
"""What every published Qwen3 has."""


class Qwen3Architecture(Architecture):
    """A Qwen3 or Qwen3-MoE model, under the names of its Hugging Face `config.json`."""

    model_type: Literal["qwen3_moe", "qwen3"] = "qwen3_moe"  # pyright: ignore[reportIncompatibleVariableOverride]  frozen
    """`qwen3_moe` = every layer a mixture of experts; `qwen3` = dense. Source: what the recipes here train."""
    norm_topk_prob: bool = True
    """Renormalise the chosen experts' probabilities. transformers' class default is false, the models say true.

    Source: config.json of Qwen3-30B-A3B and 235B-A22B.
    """
    rope_theta: float = Field(default=1e6, gt=0)
    """Base of the rotary embedding. Source: config.json of the Qwen3 releases; the 2507 ones have 1e7 and 5e6."""
    rope_scaling: dict[str, float | int | str] | None = None
    """YaRN parameters as in `config.json`, or null."""
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    """Epsilon of every RMSNorm. Source: config.json of every Qwen3."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of a random initialisation. Source: config.json of every Qwen3."""

    def to_hugging_face(self, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM read."""
        values = self.model_dump(exclude={"rope_theta", "rope_scaling"})
        name = "Qwen3MoeForCausalLM" if self.num_experts else "Qwen3ForCausalLM"
        rope = self.rope_parameters
        return {"architectures": [name], **values, "rope_parameters": rope, "dtype": dtype, "hidden_act": "silu"}

    @model_validator(mode="after")
    def experts_fit_the_model_type(self) -> Qwen3Architecture:
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
