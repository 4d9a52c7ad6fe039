"""What a job on GPUs must not do without, because it would go on slowly, or on the CPU, without a word."""

from __future__ import annotations

import os

WITHOUT = "GSPO_WITHOUT"
"""Names the part that a machine is knowingly without; `make setup` reads it too."""
ENGINE = "transformer-engine"


def cuda_fault(starts: bool, torch_version: str, cuda_version: str | None) -> str:
    """Why a role placed on GPUs would run on the CPU, in a sentence; empty where CUDA starts.

    Args:
        starts: whether torch sees a GPU.
        torch_version: of the installed torch.
        cuda_version: what that torch was built for; null = a build for CPUs.
    """
    if starts:
        return ""
    if cuda_version is None:
        return (
            f"the job is placed on GPUs, and torch {torch_version} is a build for CPUs; "
            "run `GSPO_STACK=cuda make clean setup`, or train on the CPU with placement.gpu=cpu"
        )
    driver = ", that is driver 580 or newer" if cuda_version.startswith("13.") else ""
    return (
        f"the job is placed on GPUs, and torch {torch_version} cannot start CUDA here; it requires a driver for CUDA "
        f"{cuda_version}{driver} (`nvidia-smi` shows what there is): update it, leave this node out, or train on the "
        "CPU with placement.gpu=cpu"
    )


def engine_fault(import_fault: str) -> str:
    """Why a trainer on GPUs would compute without Transformer Engine; empty where it can be imported or is waived.

    Args:
        import_fault: of `import transformer_engine.pytorch`; empty = it works.
    """
    if not import_fault or os.environ.get(WITHOUT) == ENGINE:
        return ""
    return (
        f"Transformer Engine cannot be imported ({import_fault}), so every expert would be computed on its own and "
        f"attention unfused; run `make clean setup`, or say {WITHOUT}={ENGINE} to train that way"
    )
