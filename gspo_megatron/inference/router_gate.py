"""Router logits in float32, as the trainer's are.

vllm 0.32 rounds them to the type of the model for Qwen3-MoE. In bfloat16 that alone exchanges an expert in some 3 % of
(token, layer). Importing this module has vLLM build `Float32Gate` in the place of its own `GateLinear`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.custom_op import PluggableLayer
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.platforms import current_platform


@PluggableLayer.register_oot(name="GateLinear")
class Float32Gate(GateLinear):
    """vLLM's layer, with float32 as its output type before it chooses a kernel.

    On a GPU that is one product with a float32 result. vLLM's CPU build would round to bfloat16 and widen again, so
    there the product is made here.
    """

    def __init__(self, *args: Any, out_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        # vLLM would quantise it with the rest; checkpoints in fp8 except each by its name.
        super().__init__(*args, out_dtype=out_dtype or torch.float32, **{**kwargs, "quant_config": None})
        # Otherwise vLLM packs the weight for its own product and drops it.
        self._cpu_skip_gemm_dispatch = True

    def forward(self, x: torch.Tensor) -> Any:
        """[T, H] -> [T, experts] and no bias, in float32."""
        if not current_platform.is_cpu():
            return super().forward(x)
        weight: Any = self.weight
        return self._return(torch.nn.functional.linear(x.float(), weight.float()))
