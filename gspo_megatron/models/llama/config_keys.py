"""Every key of a Llama and a Qwen2.5 `config.json` that changes what the model computes."""

from __future__ import annotations

from gspo_megatron.models.config_keys import DENSE, FIELDS, HEADS, ONLY, QUOTIENT, ConfigKeys, Field, Only

LLAMA = ConfigKeys(
    fields={
        **FIELDS,
        **DENSE,
        "vocab_size": Field(32000),
        "hidden_size": Field(4096),
        "intermediate_size": Field(11008),
        "num_hidden_layers": Field(32),
        "num_attention_heads": Field(32),
        "num_key_value_heads": Field(HEADS, null=HEADS),
        "head_dim": Field(QUOTIENT, null=QUOTIENT),
        "max_position_embeddings": Field(2048),
    },
    only={
        **ONLY,
        "attention_dropout": Only((0.0, None)),
        "mlp_bias": Only((False,)),
        "pretraining_tp": Only((1, None)),
    },
)
QWEN2 = ConfigKeys(
    fields={
        **FIELDS,
        **DENSE,
        "vocab_size": Field(151936),
        "hidden_size": Field(4096),
        "intermediate_size": Field(22016),
        "num_hidden_layers": Field(32),
        "num_attention_heads": Field(32),
        "num_key_value_heads": Field(32, null=HEADS),
        "head_dim": Field(QUOTIENT),
        "max_position_embeddings": Field(32768),
    },
    # The bias of queries, keys and values is no key of its config.json. transformers reads neither of the last two.
    only={**ONLY, "mlp_bias": Only((False,)), "pretraining_tp": Only((1,))},
)
