"""The keys of a Llama or Qwen2.5 `config.json`, typed."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.config_keys import ConfigKeys
from gspo_megatron.models.llama.config_keys import LLAMA, QWEN2

EXPERT_KEYS = {"num_experts", "num_experts_per_tok", "moe_intermediate_size"}


class LlamaArchitecture(Architecture):
    """A dense Llama, under the names of its Hugging Face `config.json`."""

    has_qkv_bias: ClassVar[bool] = False
    """Whether queries, keys and values have a bias."""
    hf_class: ClassVar[str] = "LlamaForCausalLM"
    """The class of transformers and of vLLM."""
    config_keys: ClassVar[ConfigKeys] = LLAMA
    """The table of its keys."""

    model_type: Literal["llama"] = "llama"  # pyright: ignore[reportIncompatibleVariableOverride]  frozen
    """`llama` = Llama 2 and 3. Source: Hugging Face."""

    def to_hugging_face(self, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM read."""
        values = self.model_dump(exclude={"rope_theta", "rope_scaling", "norm_topk_prob", *EXPERT_KEYS})
        rope = {"rope_parameters": self.rope_parameters, "dtype": dtype}
        return {"architectures": [self.hf_class], **values, **rope, **self.config_keys.written()}

    @model_validator(mode="after")
    def heads_divide_the_hidden_size(self) -> LlamaArchitecture:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}, "
                f"which transformers demands of {self.model_type}; choose one that is"
            )
        return self

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
    config_keys: ClassVar[ConfigKeys] = QWEN2

    model_type: Literal["qwen2"] = "qwen2"  # pyright: ignore[reportIncompatibleVariableOverride]  frozen
    """`qwen2` = Qwen2 and Qwen2.5. Source: Hugging Face."""

    @model_validator(mode="after")
    def heads_fill_the_hidden_size(self) -> Qwen2Architecture:
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"head_dim={self.head_dim} * num_attention_heads={self.num_attention_heads} is not "
                f"hidden_size={self.hidden_size}: vLLM's Qwen2 takes the quotient; set head_dim to it"
            )
        return self
