"""Every key of a Qwen3 and a Qwen3-MoE `config.json` that changes what the model computes."""

from __future__ import annotations

from gspo_megatron.models.config_keys import DENSE, FIELDS, HEADS, ONLY, QUOTIENT, ConfigKeys, Field, Only

QWEN3 = ConfigKeys(
    fields={
        **FIELDS,
        **DENSE,
        "vocab_size": Field(151936),
        "hidden_size": Field(4096),
        "intermediate_size": Field(22016),
        "num_hidden_layers": Field(32),
        "num_attention_heads": Field(32),
        "num_key_value_heads": Field(32, null=HEADS),
        "head_dim": Field(128),
        "max_position_embeddings": Field(32768),
    },
    only=ONLY,
)
QWEN3_MOE = ConfigKeys(
    fields={
        **FIELDS,
        "vocab_size": Field(151936),
        "hidden_size": Field(2048),
        "intermediate_size": Field(6144),
        "num_hidden_layers": Field(24),
        "num_attention_heads": Field(32),
        "num_key_value_heads": Field(4),
        "head_dim": Field(QUOTIENT),
        "max_position_embeddings": Field(32768),
        "num_experts": Field(128),
        "num_experts_per_tok": Field(8),
        "moe_intermediate_size": Field(768),
        "norm_topk_prob": Field(False),
    },
    only={**ONLY, "mlp_only_layers": Only(([], None)), "decoder_sparse_step": Only((1,))},
    aliases={"num_local_experts": "num_experts"},
)
