"""Qwen3 and Qwen3-MoE."""

from gspo_megatron.models.family import Family
from gspo_megatron.models.layer_costs import attention_bytes
from gspo_megatron.models.qwen3.architecture import ONLY_VALUES, Qwen3Architecture
from gspo_megatron.models.qwen3.costs import layer_products, mixer_bytes, mixer_work
from gspo_megatron.models.qwen3.megatron_settings import megatron_settings
from gspo_megatron.models.qwen3.vllm_layout import server_layer
from gspo_megatron.models.qwen3.weight_table import layer_parameters, layer_shapes

QWEN3 = Family(
    name="qwen3",
    architectures={"qwen3": Qwen3Architecture, "qwen3_moe": Qwen3Architecture},
    only_values=ONLY_VALUES,
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
