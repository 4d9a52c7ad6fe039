"""The weight update on vLLM's CUDA classes, beside vLLM's own first load of the same tensors.

    torchrun --nproc-per-node 2 tools/cuda_dry_reload.py RECIPE --capability 10.0        one line of JSON

Kernels of newer GPUs keep weights reordered, swapped and padded. So what an update leaves is not compared with what was
sent, but with a second model, which reads the whole tensors as vLLM's loader reads them from a checkpoint; one in fp8
is made by vLLM's own quantiser. Every rank compares each parameter and buffer to the bit, after two updates: the first
brings other values. No kernel runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed

from gspo_megatron.cluster.machines import machine_of
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import hf_shapes
from gspo_megatron.models.vllm_layout import ServerLayout, server_parameters
from gspo_megatron.models.weight_format import SCALE, form_of, is_quantised
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.estimate.padded_experts import UNPADDED, expert_widths, pads_experts
from gspo_megatron.transport.weights.checksum import plane
from gspo_megatron.transport.weights.quantiser import block_maxima, encode, scales_of
from tools.cuda_dry_vllm import make_config, pretend

RANKS = 2
SMALL = (
    "model.architecture.num_hidden_layers=2", "model.architecture.num_experts=8", "model.architecture.vocab_size=512",
)  # fmt: skip
NARROW = "model.architecture.moe_intermediate_size=384"
"""192 columns on each of two ranks, as the 30B has over four and the 235B over eight."""

FP8 = "rollout.weight_dtype=fp8"

CASES: dict[str, tuple[str, ...]] = {
    "whole slices": (),
    "whole experts": ("rollout.expert_parallel=true",),
    "narrow slices": (NARROW,),
    "narrow slices, triton": (NARROW, f"rollout.vllm.moe_backend={UNPADDED}"),
    "fp8": (FP8,),
    "fp8, whole experts": (FP8, "rollout.expert_parallel=true"),
    "fp8, narrow slices": (FP8, NARROW),
    "float32": ("model.dtype=float32", "model.architecture.hidden_size=512"),
}
REFUSALS = ("experts-type", "fp8-blocks")
"""Findings of the plan where vLLM or the transfer refuses a case."""
KINDS = {"9.0": "h100", "10.0": "b200", "10.3": "b300"}
"""A GPU of each capability, for the plan."""


def main() -> int:
    """Print one line of JSON on rank 0; exit 1 where a rank found a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--capability", default="9.0")
    chosen = parser.parse_args()
    pretend(chosen.capability)
    answer_scale_layout(chosen.capability)
    distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, changes in CASES.items():
        overrides = (*SMALL, f"rollout.tensor_parallel={RANKS}", f"placement.gpu={KINDS[chosen.capability]}", *changes)
        rows: list[Any] = [None] * RANKS
        with tempfile.TemporaryDirectory() as place:
            distributed.all_gather_object(rows, look(load_recipe(chosen.recipe, overrides), Path(place)))
        found[name] = rows[0] | {"wrong": [text for row in rows for text in row["wrong"]]}
    if not distributed.get_rank():
        print(json.dumps(found), flush=True)
    # Threads of vLLM would keep the process.
    os._exit(int(any(one["wrong"] for one in found.values())))


def answer_scale_layout(capability: str) -> None:
    """Give DeepGEMM's function that lays out scales, which is compiled for CUDA only, a form for tensors on a CPU.

    Hopper takes float32 scales of blocks as they are (its `csrc/apis/layout.hpp`); Blackwell takes exponents, four to
    an int32 and column after column, for which FlashInfer has the same function in torch.
    """
    # Modules that this environment's type checker does not know; the second registers the function.
    flashinfer, _ = (
        importlib.import_module(name) for name in ("flashinfer.deep_gemm", "vllm.third_party.deep_gemm._C")
    )

    @torch.library.impl("deep_gemm::transform_sf_into_required_layout", "CPU")
    def lay_out(
        sf: Tensor, mn: int, k: int, recipe: list[int], num_groups: int | None = None, is_sfa: bool | None = None,
        disable_ue8m0_cast: bool = False, psum_layout: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if capability.startswith("9.") or disable_ue8m0_cast:
            return sf
        return flashinfer.transform_sf_into_required_layout(sf, mn, k, tuple(recipe), num_groups, bool(is_sfa))


def look(recipe: Recipe, place: Path) -> dict[str, Any]:
    """Load and update on this rank; what is not as it should be, and not as the plan says."""
    refused = any(one.code in REFUSALS for one in make_plan(recipe).findings)
    try:
        found = update_twice(recipe, place)
    except ValueError as error:
        return {"refused": str(error), "wrong": [] if refused else [str(error)]}
    if refused:
        found["wrong"].append("vLLM takes what the plan refuses")
    planned = expert_widths(recipe, recipe.arch)[1] if pads_experts(recipe, machine_of(recipe)) else found["width"]
    if found["padded"] != planned:
        found["wrong"].append(f"planned is a width of {planned}")
    return found


def update_twice(recipe: Recipe, place: Path) -> dict[str, Any]:
    """Load the tensors by both ways on this rank; what differs."""
    dtype = getattr(torch, recipe.model.dtype)
    tensors = [dict(make_tensors(recipe, dtype, seed)) for seed in (1, 2)]
    loaded, config = build(recipe, place)
    cast(Any, loaded).load_weights(as_checkpoint(recipe, tensors[1]).items())
    finish_load(loaded, config)
    updated, config = build(recipe, place)
    finish_load(updated, config)
    before = addresses(updated)
    layout = layout_of(updated, recipe)
    for sent in tensors:
        update(updated, config, recipe, layout, as_sent(recipe, sent))
    wanted, now = ({**dict(state(model)), **dict(kernel_scales(model))} for model in (loaded, updated))
    assert wanted.keys() == now.keys(), wanted.keys() ^ now.keys()
    wrong = [f"{name} differs" for name, value in wanted.items() if not torch.equal(bits(value), bits(now[name]))]
    wrong += [f"{name} has moved" for name, address in addresses(updated).items() if address != before[name]]
    return {**describe_experts(updated), "compared": len(wanted), "wrong": wrong}


def make_tensors(recipe: Recipe, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Random tensors of the whole model by their Hugging Face names, equal on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in hf_shapes(recipe.arch).items():
        yield name, torch.randn(shape, generator=generator).to(dtype)


def as_checkpoint(recipe: Recipe, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint of these tensors holds, quantised by vLLM where the servers hold fp8."""
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found[name] = tensor
        if form_of(recipe).fp8 and is_quantised(name):
            found[name], found[name + SCALE] = per_block_cast_to_fp8(tensor)
    return found


def as_sent(recipe: Recipe, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as the trainer's sender makes it."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found[name] = tensor
        if form_of(recipe).fp8 and is_quantised(name):
            scales = found[name + SCALE] = scales_of(block_maxima(tensor, 0, 0))
            found[name] = encode(tensor, scales)
    return found


def build(recipe: Recipe, place: Path) -> tuple[torch.nn.Module, Any]:
    """vLLM's model on this rank with values of no meaning, and its configuration."""
    from gspo_megatron.inference import router_gate  # noqa: F401  its layer in the place of vLLM's

    config = make_config(recipe, place)
    config.device_config.device = torch.device("cpu")
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm.model_executor.model_loader.utils import initialize_model

    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            init_distributed_environment(RANKS, distributed.get_rank(), "env://", distributed.get_rank(), "gloo")
            initialize_model_parallel(RANKS, 1, backend="gloo")
        torch.set_default_dtype(config.model_config.dtype)
        model = initialize_model(vllm_config=config)
        torch.set_default_dtype(torch.float32)
        record_metadata_for_reloading(model)
    return model, config


def finish_load(model: torch.nn.Module, config: Any) -> None:
    """What vLLM does once after the first load."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    with set_current_vllm_config(config):
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))


def layout_of(model: torch.nn.Module, recipe: Recipe) -> ServerLayout:
    """As a worker reports it."""
    from gspo_megatron.inference.vllm_worker import expert_width

    return ServerLayout(RANKS, expert_parallel=recipe.rollout.expert_parallel, expert_width=expert_width(model))


def update(model: torch.nn.Module, config: Any, recipe: Recipe, layout: ServerLayout, sent: dict[str, Tensor]) -> None:
    """One weight update, but for the wire."""
    from vllm.config import set_current_vllm_config

    from gspo_megatron.inference import vllm_worker

    form = form_of(recipe)
    expected = form.wanted(server_parameters(recipe.arch, layout, distributed.get_rank()))
    with set_current_vllm_config(config):
        vllm_worker.initialize_layerwise_reload(model)
        vllm_worker.refuse_other_model(model, expected, form, layout)
        for parameter in expected:
            values = torch.zeros(parameter.shape, dtype=getattr(torch, form.dtype_of(parameter.name)))
            for piece in parameter.pieces:
                whole = sent[piece.tensor]
                part = whole.view(len(whole), -1)[slice(*piece.rows), piece.column : piece.column + piece.width]
                plane(values, piece).copy_(part)
            vllm_worker.load_whole(model, parameter.name, values)
        vllm_worker.finalize_layerwise_reload(model, config.model_config)


def state(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the model computes with."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def kernel_scales(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Scales of experts as their kernel holds them: vLLM makes the kernel anew at every load."""
    for name, module in model.named_modules():
        config = getattr(getattr(module, "quant_method", None), "moe_quant_config", None)
        for part in ("w1_scale", "w2_scale"):
            if isinstance(scale := getattr(config, part, None), Tensor):
                yield f"{name}.kernel.{part}", scale


def bits(tensor: Tensor) -> Tensor:
    """[bytes] of its values."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def addresses(model: torch.nn.Module) -> dict[str, int]:
    """Where graphs that were captured read from."""
    return {name: tensor.data_ptr() for name, tensor in state(model)}


def describe_experts(model: torch.nn.Module) -> dict[str, Any]:
    """The kernels that vLLM took, and the width that it made of a slice."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    layer = next(module for module in model.modules() if isinstance(module, RoutedExperts))
    shape, method = layer.moe_config, cast(Any, layer.quant_method)
    return {
        "kernels": (getattr(method, "fp8_backend", None) or method.unquantized_backend).value,
        "width": shape.intermediate_size_per_partition_unpadded,
        "padded": shape.intermediate_size_per_partition,
    }


if __name__ == "__main__":
    sys.exit(main())
