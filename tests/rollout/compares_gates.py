"""Writes what vLLM's own router layer and ours make of the same bfloat16 values: `python compares_gates.py OUT`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

TOKENS, HIDDEN, EXPERTS, CHOSEN = 4096, 256, 64, 8


def main() -> None:
    """Theirs first: importing ours takes its place."""
    out = Path(sys.argv[1])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    weight = (0.02 * torch.randn(EXPERTS, HIDDEN, generator=generator)).bfloat16()
    found = {}
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{out.absolute()}.meeting", 0, "gloo")
        initialize_model_parallel(1)
        found["vllm"] = compare(tokens, weight)
        worker = importlib.import_module("gspo_megatron.inference.vllm_worker")
        found["ours"] = compare(tokens, weight)
        found["ours, updated"] = compare(tokens, weight, worker.load_whole)
    out.write_text(json.dumps(found))


def compare(tokens: torch.Tensor, weight: torch.Tensor, load_whole: Any = None) -> dict[str, object]:
    """Type of the logits, share of tokens with another expert than float64 chooses, largest error of a logit."""
    gate: Any = GateLinear(HIDDEN, EXPERTS, params_dtype=torch.bfloat16)
    model: Any = torch.nn.ModuleDict({"gate": gate})
    record_metadata_for_reloading(model)
    gate.weight.data.copy_(torch.zeros_like(weight) if load_whole else weight)
    gate.quant_method.process_weights_after_loading(gate)
    if load_whole:
        initialize_layerwise_reload(model)
        load_whole(model, "gate.weight", weight)
        finalize_layerwise_reload(model, None)
    logits, bias = gate(tokens)
    assert bias is None
    wanted = tokens.double() @ weight.double().T
    chosen, right = (scores.topk(CHOSEN).indices.sort().values for scores in (logits.double(), wanted))
    moved = (chosen != right).any(1).double().mean()
    return {"dtype": str(logits.dtype), "moved": float(moved), "error": float((logits - wanted).abs().max())}


if __name__ == "__main__":
    main()
