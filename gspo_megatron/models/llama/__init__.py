"""Llama 2 and 3, and Qwen2.5: dense decoders without norms of queries and keys."""

from gspo_megatron.models.family import Family
from gspo_megatron.models.layer_costs import attention_bytes
from gspo_megatron.models.llama.architecture import LlamaArchitecture, Qwen2Architecture
from gspo_megatron.models.llama.config_keys import LLAMA as LLAMA_KEYS
from gspo_megatron.models.llama.config_keys import QWEN2 as QWEN2_KEYS
from gspo_megatron.models.llama.costs import layer_products, mixer_bytes, mixer_work
from gspo_megatron.models.llama.megatron_settings import megatron_settings
from gspo_megatron.models.llama.vllm_layout import server_layer
from gspo_megatron.models.llama.weight_table import layer_parameters, layer_shapes

LLAMA = Family(
    name="llama",
    architectures={"llama": LlamaArchitecture, "qwen2": Qwen2Architecture},
    config_keys={"llama": LLAMA_KEYS, "qwen2": QWEN2_KEYS},
    rope_types=("llama3", "yarn"),
    layer_shapes=layer_shapes,
    layer_parameters=layer_parameters,
    server_layer=server_layer,
    megatron_settings=megatron_settings,
    layer_products=layer_products,
    attention_bytes=attention_bytes,
    mixer_bytes=mixer_bytes,
    mixer_work=mixer_work,
)
