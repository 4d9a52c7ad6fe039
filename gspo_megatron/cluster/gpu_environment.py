"""Environment variables of a role on GPUs: what each needs, and what a site must not set otherwise."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from gspo_megatron.cluster.machines import BLACKWELL, machine_of
from gspo_megatron.config.schema import Recipe

ALLOCATOR = "PYTORCH_ALLOC_CONF"
"""Settings of torch's allocators. It counts before `PYTORCH_CUDA_ALLOC_CONF`. Source: c10/core/AllocatorConfig.h."""
OLD_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
ROUNDED_MIB = 256
"""Pinned host memory up to this size is rounded up to a power of two, so that blocks can be used again; a larger block
is what was asked for. Weights and optimizer states are larger."""
ONE_QUEUE = "CUDA_DEVICE_MAX_CONNECTIONS"
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
ATTENTION_SWITCHES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""Of Transformer Engine: 0 takes a kind of attention away."""
NONDETERMINISTIC = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
SCALED_SOFTMAX = "NVTE_APPLY_QK_LAYER_SCALING"


def trainer_variables(recipe: Recipe) -> dict[str, str]:
    """Variables of a trainer rank on a GPU."""
    trainer = recipe.trainer
    # What a worker beside a trainer opens is a plain allocation; everywhere else segments that grow do not break up.
    grows = "False" if machine_of(recipe).colocated else "True"
    found = {ALLOCATOR: f"expandable_segments:{grows},pinned_max_round_threshold_mb:{ROUNDED_MIB}"}
    splits = trainer.tensor_parallel > 1 or trainer.context_parallel > 1
    if splits and machine_of(recipe).device.kind not in BLACKWELL:
        # Megatron overlaps computing and communication by the order of launches, which one hardware queue keeps, and
        # a Blackwell GPU with any number. Source: Megatron-LM, `validate_args`.
        found[ONE_QUEUE] = "1"
    if trainer.megatron.given().get("deterministic_mode"):
        # Megatron's Transformer Engine layers refuse to start without it.
        found[NONDETERMINISTIC] = "0"
    if recipe.model.dtype == "float32":
        # Transformer Engine would multiply in TF32.
        found["NVIDIA_TF32_OVERRIDE"] = "0"
    return found


def server_variables(recipe: Recipe) -> dict[str, str]:
    """Variables of a vLLM server on a GPU."""
    found = {}
    if recipe.rollout.model_runner is not None:
        found[RUNNER] = "1" if recipe.rollout.model_runner == "v2" else "0"
    if recipe.model.dtype == "float32":
        # Triton's products of float32 are TF32 otherwise, three digits instead of seven.
        found["TRITON_F32_DEFAULT"] = "ieee"
    return found


def compiler_variables(packages: Path | None = None) -> dict[str, str]:
    """Where FlashInfer finds the compiler that fits the installed torch; empty without one among the packages.

    A site's own CUDA is of any version, and headers of one beside the compiler of another do not compile.

    Args:
        packages: directory of the installed packages; null = of this Python.
    """
    root = (packages or Path(sysconfig.get_paths()["purelib"])) / "nvidia"
    home = next((place.parent.parent for place in sorted(root.glob("cu*/bin/nvcc"))), None)
    if home is None:
        return {}
    return {"CUDA_HOME": str(home), "PATH": os.pathsep.join([str(home / "bin"), os.environ.get("PATH", "")])}


def site_faults(recipe: Recipe, environment: Mapping[str, str]) -> Iterator[str]:
    """What acts in this environment that a trainer rank on a GPU cannot work with, a sentence each."""
    name = ALLOCATOR if environment.get(ALLOCATOR) else OLD_ALLOCATOR
    words = environment.get(name, "").replace(" ", "").split(",")
    if machine_of(recipe).colocated and "expandable_segments:True" in words:
        yield (
            f"{name}={environment[name]} is set here: memory of segments that grow cannot be handed to a server on the "
            "same GPU (CUDA IPC); unset it (site file), or set placement.rollout_nodes"
        )
    for name in ATTENTION_SWITCHES:
        if environment.get(name) == "0":
            yield (
                f"{name}=0 is set here and takes away a kind of attention that Transformer Engine would choose from; "
                "unset it (site file), and choose one by trainer.megatron.attention_backend"
            )
    if environment.get(SCALED_SOFTMAX) == "1":
        yield f"{SCALED_SOFTMAX}=1 is set here and changes how attention is scaled; unset it (site file)"


def replaced_settings(environment: Mapping[str, str]) -> str:
    """A sentence about a site's allocator setting that does not act on trainers; empty without one."""
    old, ours = environment.get(OLD_ALLOCATOR), environment.get(ALLOCATOR)
    if not old or not ours:
        return ""
    return f"{OLD_ALLOCATOR}={old} of this site does not act on trainers, which have {ALLOCATOR}={ours}"
