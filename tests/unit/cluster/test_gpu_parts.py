"""What a job on GPUs is refused for: roles that would run on the CPU, or unfused, without a word."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gspo_megatron.cluster.gpu_parts import ENGINE, WITHOUT, cuda_fault, engine_fault
from gspo_megatron.config.schema import Recipe
from gspo_megatron.inference.server import prepare_environment
from gspo_megatron.models import load_recipe
from launch.lib import probe


@pytest.fixture(autouse=True)
def no_waiver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WITHOUT, raising=False)


def recipe(gpu: str) -> Recipe:
    return load_recipe(Path("recipes/tiny_moe.yaml"), [f"placement.gpu={gpu}"])


@pytest.mark.parametrize(
    ("starts", "cuda", "said"),
    [
        (True, "13.0", ""),
        (False, "13.0", "requires a driver for CUDA 13.0, that is driver 580 or newer"),
        (False, "12.8", "requires a driver for CUDA 12.8 (`nvidia-smi`"),
        (False, None, "torch 2.13.0 is a build for CPUs; run `GSPO_STACK=cuda make clean setup`"),
    ],
)
def test_cuda_that_does_not_start_is_a_sentence_with_the_driver(starts: bool, cuda: str | None, said: str) -> None:
    fault = cuda_fault(starts, "2.13.0", cuda)
    assert said in fault and bool(fault) == bool(said)


def test_a_missing_transformer_engine_is_refused_unless_it_is_waived_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_fault("") == ""
    assert "(ImportError: undefined symbol)" in engine_fault("ImportError: undefined symbol")
    monkeypatch.setenv(WITHOUT, ENGINE)
    assert engine_fault("ImportError: undefined symbol") == ""


def use_cuda(monkeypatch: pytest.MonkeyPatch, starts: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: starts)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize(("gpu", "starts", "engine", "said"), [
    ("cpu", False, "ModuleNotFoundError: it", ""),
    ("h100", False, "", "cannot start CUDA here"),
    ("h100", True, "ModuleNotFoundError: it", "Transformer Engine cannot be imported"),
    ("h100", True, "", ""),
])  # fmt: skip
def test_the_trainer_refuses_what_would_be_slow_without_a_word(
    gpu: str, starts: bool, engine: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gspo_megatron.policy import specs

    use_cuda(monkeypatch, starts)
    monkeypatch.setattr(specs, "import_fault", lambda: engine)
    if not said:
        return specs.refuse_fallbacks(recipe(gpu))
    with pytest.raises(SystemExit, match=said):
        specs.refuse_fallbacks(recipe(gpu))


def test_a_server_placed_on_gpus_does_not_serve_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_SERVER_DEV_MODE", "VLLM_NO_USAGE_STATS", "OMP_NUM_THREADS", "PYTORCH_NVML_BASED_CUDA_CHECK",
                 "VLLM_CPU_OMP_THREADS_BIND", "TORCHDYNAMO_DISABLE", "GSPO_ROLLOUT_SERVER"):  # fmt: skip
        monkeypatch.setenv(name, "")  # what it sets does not outlive this test
    use_cuda(monkeypatch, starts=False)
    assert prepare_environment(0, recipe("cpu")) is False
    with pytest.raises(SystemExit, match=r"rollout server 3: .*cannot start CUDA here"):
        prepare_environment(3, recipe("h100"))


def test_the_preflight_reports_both_by_role(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cuda(monkeypatch, starts=True)
    modules: dict[str, Any] = {"torch": torch}

    def find(name: str) -> Any:
        if name not in modules:
            raise ModuleNotFoundError(f"No module named '{name}'")
        return modules[name]

    monkeypatch.setattr(probe, "importlib", SimpleNamespace(import_module=find))
    (fault,) = probe.find_fallbacks("trainer")
    assert "(ModuleNotFoundError: No module named 'transformer_engine.pytorch')" in fault
    assert probe.find_fallbacks("rollout") == []
    use_cuda(monkeypatch, starts=False)
    for kind in ("trainer", "rollout"):
        (fault,) = probe.find_fallbacks(kind)
        assert "driver 580 or newer" in fault
