"""vLLM's CUDA build where there is no GPU, and what it makes of our arguments.

    python tools/cuda_dry_vllm.py RECIPE ...        one line of JSON

A platform answers in the place of the driver. No kernel runs. `tools/cuda_dry.py` starts it in the environment of
`requirements/cuda.txt`, beside a libcuda that knows no device.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import vllm.platforms
from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability

from gspo_megatron.cluster.machines import takes_turns
from gspo_megatron.config.schema import Recipe
from gspo_megatron.inference import vllm_plugin
from gspo_megatron.models import load_recipe
from gspo_megatron.models.vllm_engine import engine_arguments, to_options

MEMORY = 79 << 30


class Pretended(NonNvmlCudaPlatform):
    """A GPU of a given capability that answers what vLLM asks before it starts a kernel."""

    capability: tuple[int, int] = (9, 0)

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:  # type: ignore[override]
        return DeviceCapability(*cls.capability)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H100 80GB HBM3" if cls.capability < (10, 0) else "NVIDIA B200"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return MEMORY

    @classmethod
    def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
        return True

    @classmethod
    def device_count(cls) -> int:
        return 8

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return 132

    @classmethod
    def is_integrated_gpu(cls, device_id: int = 0) -> bool:
        return False

    @classmethod
    def get_cuda_runtime_major(cls) -> int:
        return 13

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        return None

    @classmethod
    def log_warnings(cls) -> None:
        return None

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        # NCCL's would ask the driver.
        return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"


def pretend(capability: str) -> None:
    """Put the platform in the driver's place, for vLLM and for what it asks of torch."""
    major, minor = capability.split(".")
    Pretended.capability = (int(major), int(minor))
    vllm.platforms._current_platform = Pretended()  # type: ignore[assignment]
    answers: dict[str, Any] = {
        "device_count": lambda: 8,
        "get_device_capability": lambda *_: Pretended.capability,
        "get_device_name": lambda *_: Pretended.get_device_name(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.accelerator.device_count = answers["device_count"]
    torch.accelerator.current_device_index = lambda: 0
    # Dynamo asks the driver even for what is computed on a CPU, as vLLM's quantiser is here.
    torch._dynamo.config.disable = True


def make_config(recipe: Recipe, place: Path) -> Any:
    """vLLM's whole configuration from the command line of a server of this recipe."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    vllm_plugin.register()
    (place / "config.json").write_text(json.dumps(recipe.arch.to_hugging_face(recipe.model.dtype)))
    options = to_options(engine_arguments(recipe, place, has_gpu=True, sleeps=takes_turns(recipe)))
    parsed: Any = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(options)
    engine = AsyncEngineArgs.from_cli_args(parsed)
    return engine.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def resolve_arguments(recipe: Recipe, place: Path) -> dict[str, Any]:
    """What vLLM decided from our arguments and its defaults."""
    found = make_config(recipe, place)
    scheduler, compilation = found.scheduler_config, found.compilation_config
    return {
        "second_runner": bool(found.use_v2_model_runner),
        "head": str(found.model_config.head_dtype),
        "logprobs_mode": str(found.model_config.logprobs_mode),
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "chunked_prefill": bool(scheduler.enable_chunked_prefill),
        "async_scheduling": bool(scheduler.async_scheduling),
        "graphs": compilation.cudagraph_mode.name,
        "largest_graph": compilation.max_cudagraph_capture_size,
        "prefix_caching": bool(found.cache_config.enable_prefix_caching),
        "sleep_mode": bool(found.model_config.enable_sleep_mode),
        "tensor_parallel": found.parallel_config.tensor_parallel_size,
        "weight_transfer": found.weight_transfer_config.backend,
    }


def main() -> int:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+")
    chosen = parser.parse_args()
    pretend("9.0")
    found: dict[str, Any] = {}
    for path in chosen.recipes:
        with tempfile.TemporaryDirectory() as place:
            found[path.stem] = resolve_arguments(load_recipe(path), Path(place))
    print(json.dumps(found), flush=True)
    # Threads of vLLM would keep the process.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
