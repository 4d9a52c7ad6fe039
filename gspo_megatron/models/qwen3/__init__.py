"""Qwen3 and Qwen3-MoE."""

from gspo_megatron.models.family import Family
from gspo_megatron.models.layer_costs import attention_bytes
from gspo_megatron.models.qwen3.architecture import Qwen3Architecture
from gspo_megatron.models.qwen3.config_keys import QWEN3 as QWEN3_KEYS
from gspo_megatron.models.qwen3.config_keys import QWEN3_MOE as QWEN3_MOE_KEYS
from gspo_megatron.models.qwen3.costs import layer_products, mixer_bytes, mixer_work
from gspo_megatron.models.qwen3.megatron_settings import megatron_settings
from gspo_megatron.models.qwen3.vllm_layout import server_layer
from gspo_megatron.models.qwen3.weight_table import layer_parameters, layer_shapes

QWEN3 = Family(
    name="qwen3",
    architectures={"qwen3": Qwen3Architecture, "qwen3_moe": Qwen3Architecture},
    config_keys={"qwen3": QWEN3_KEYS, "qwen3_moe": QWEN3_MOE_KEYS},
    rope_types=("yarn",),
    layer_shapes=layer_shapes,
    layer_parameters=layer_parameters,
    server_layer=server_layer,
    megatron_settings=megatron_settings,
    layer_products=layer_products,
    attention_bytes=attention_bytes,
    mixer_bytes=mixer_bytes,
    mixer_work=mixer_work,
)
