"""The keys of a Llama or Qwen2.5 `config.json`, typed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from gspo_megatron.config.model_section import Architecture

ONLY_VALUES = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "pretraining_tp": 1,
}
"""What every published Llama 2, Llama 3 and Qwen2.5 has; the bias of Qwen2.5 is no key of its config.json."""
EXPERT_KEYS = {"num_experts", "num_experts_per_tok", "moe_intermediate_size"}


class LlamaArchitecture(Architecture):
    """A dense Llama, under the names of its Hugging Face `config.json`."""

    has_qkv_bias: ClassVar[bool] = False
    """Whether queries, keys and values have a bias."""
    hf_class: ClassVar[str] = "LlamaForCausalLM"
    """The class of transformers and of vLLM."""

    model_type: Literal["llama"] = "llama"  # pyright: ignore[reportIncompatibleVariableOverride]  frozen
    """`llama` = Llama 2 and 3. Source: Hugging Face."""
    rope_theta: float = Field(default=1e4, gt=0)
    """Base of the rotary embedding. Source: transformers' default of Llama; Llama 3 has 5e5."""
    rope_scaling: dict[str, float | int | str] | None = None
    """Parameters of rope_type llama3 or yarn as in `config.json`, or null."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of every RMSNorm. Source: config.json of Llama 2 and 3."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of a random initialisation. Source: config.json of Llama."""

    def to_hugging_face(self, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM read."""
        values = self.model_dump(exclude={"rope_theta", "rope_scaling", *EXPERT_KEYS})
        rope = self.rope_parameters
        return {"architectures": [self.hf_class], **values, "rope_parameters": rope, "dtype": dtype} | ONLY_VALUES

    @model_validator(mode="before")
    @classmethod
    def fill_in_the_head_width(cls, values: Any) -> Any:
        """head_dim is hidden_size / num_attention_heads where it is not given, as in transformers."""
        if not isinstance(values, Mapping) or values.get("head_dim") is not None:
            return values
        hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
        if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
            return values
        return {**values, "head_dim": hidden // heads}

    @model_validator(mode="after")
    def is_dense(self) -> LlamaArchitecture:
        given = {name: getattr(self, name) for name in sorted(EXPERT_KEYS) if getattr(self, name)}
        for name, value in given.items():
            raise ValueError(f"{name}={value} with model_type={self.model_type}, which has no experts; set {name}=0")
        return self


class Qwen2Architecture(LlamaArchitecture):
    """A dense Qwen2.5, under the names of its Hugging Face `config.json`."""

    has_qkv_bias: ClassVar[bool] = True
    hf_class: ClassVar[str] = "Qwen2ForCausalLM"

    model_type: Literal["qwen2"] = "qwen2"  # pyright: ignore[reportIncompatibleVariableOverride]  frozen
    """`qwen2` = Qwen2 and Qwen2.5. Source: Hugging Face."""
    rope_theta: float = Field(default=1e6, gt=0)
    """Base of the rotary embedding. Source: config.json of Qwen2.5."""
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    """Epsilon of every RMSNorm. Source: config.json of Qwen2.5."""

    @model_validator(mode="after")
    def heads_fill_the_hidden_size(self) -> Qwen2Architecture:
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"head_dim={self.head_dim} * num_attention_heads={self.num_attention_heads} is not "
                f"hidden_size={self.hidden_size}: vLLM's Qwen2 takes the quotient; set head_dim to it"
            )
        return self
