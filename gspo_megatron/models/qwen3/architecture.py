"""The keys of a Qwen3 `config.json`, typed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.qwen3.config_keys import QWEN3, QWEN3_MOE


class Qwen3Architecture(Architecture):
    """A Qwen3 or Qwen3-MoE model, under the names of its Hugging Face `config.json`."""

    model_type: Literal["qwen3_moe", "qwen3"] = "qwen3_moe"  # pyright: ignore[reportIncompatibleVariableOverride]  frozen
    """`qwen3_moe` = every layer a mixture of experts; `qwen3` = dense. Source: what the recipes here train."""

    def to_hugging_face(self, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM read."""
        values = self.model_dump(exclude={"rope_theta", "rope_scaling"})
        name, keys = ("Qwen3MoeForCausalLM", QWEN3_MOE) if self.num_experts else ("Qwen3ForCausalLM", QWEN3)
        rope = {"rope_parameters": self.rope_parameters, "dtype": dtype}
        return {"architectures": [name], **values, **rope, **keys.written()}

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
        if self.num_experts_per_tok == 1 and self.norm_topk_prob:
            raise ValueError(
                "norm_topk_prob=true with num_experts_per_tok=1 weighs every expert with 1, and megatron-core does not "
                "compute it; set norm_topk_prob=false if the weights allow it, or take another model"
            )
        return self
