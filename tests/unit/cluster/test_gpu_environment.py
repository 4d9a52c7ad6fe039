"""Variables of roles on GPUs, and a site's settings that would break them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gspo_megatron.cluster import gpu_environment
from gspo_megatron.cluster.gpu_environment import (
    ALLOCATOR,
    NONDETERMINISTIC,
    OLD_ALLOCATOR,
    ONE_QUEUE,
    RUNNER,
    compiler_variables,
    replaced_settings,
    server_variables,
    site_faults,
    trainer_variables,
)
from gspo_megatron.cluster.hosts import Host, Ports, spread, tasks
from gspo_megatron.config import Recipe
from gspo_megatron.models import load_recipe

GPU = Path("recipes/qwen3_30b_a3b_gspo.yaml")
APART = ("placement.rollout_nodes=2", "placement.nodes=4")


def recipe(*overrides: str) -> Recipe:
    return load_recipe(GPU, list(overrides))


def test_segments_grow_where_no_server_opens_them() -> None:
    assert "expandable_segments:False," in trainer_variables(recipe())[ALLOCATOR]
    assert "expandable_segments:True," in trainer_variables(recipe(*APART))[ALLOCATOR]


def test_torch_takes_the_allocator_setting() -> None:
    """It refuses a key that it does not know."""
    setting = trainer_variables(recipe())[ALLOCATOR]
    program = f"import torch; torch._C._accelerator_setAllocatorSettings({setting!r})"
    for text, code in ((program, 0), (program.replace("pinned_max_round_threshold_mb", "pinned_rounding"), 1)):
        assert subprocess.run([sys.executable, "-c", text], capture_output=True).returncode == code


@pytest.mark.parametrize(
    ("overrides", "one"),
    [
        (["trainer.context_parallel=1"], False),
        (["trainer.context_parallel=2"], True),
        (["trainer.context_parallel=1", "trainer.tensor_parallel=2"], True),
        (["trainer.context_parallel=2", "placement.gpu=b200"], False),
    ],
)
def test_one_queue_where_the_order_of_launches_overlaps(overrides: list[str], one: bool) -> None:
    assert (trainer_variables(recipe(*overrides)).get(ONE_QUEUE) == "1") is one


def test_the_variables_are_those_of_the_tasks(tmp_path: Path) -> None:
    hosts = [Host(f"n{index}", f"10.0.0.{index}") for index in range(4)]
    made = tasks(recipe(), spread(recipe(), hosts, 8), Ports.of_job(1), tmp_path)
    trainers = [task.environment for task in made if task.kind == "trainer"]
    assert trainers and all(trainer_variables(recipe()).items() <= one.items() for one in trainers)
    tiny = load_recipe(Path("recipes/tiny_moe.yaml"))
    on_cpu = tasks(tiny, spread(tiny, hosts[:1], 0), Ports.of_job(1), tmp_path)
    assert not any({ALLOCATOR, ONE_QUEUE} & set(task.environment) for task in on_cpu)


@pytest.mark.parametrize("name", [ALLOCATOR, OLD_ALLOCATOR])
def test_a_setting_that_breaks_the_hand_over_is_named(name: str) -> None:
    (fault,) = site_faults(recipe(), {name: "max_split_size_mb:64, expandable_segments:True"})
    assert name in fault and "CUDA IPC" in fault
    assert not list(site_faults(recipe(*APART), {name: "expandable_segments:True"}))


def test_a_setting_that_does_not_act_is_said() -> None:
    environment = {OLD_ALLOCATOR: "expandable_segments:True", **trainer_variables(recipe())}
    assert not list(site_faults(recipe(), environment))
    assert OLD_ALLOCATOR in replaced_settings(environment)
    assert replaced_settings({}) == ""


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("NVTE_FLASH_ATTN", "0", True),
        ("NVTE_FUSED_ATTN", "0", True),
        ("NVTE_UNFUSED_ATTN", "0", True),
        ("NVTE_FUSED_ATTN", "1", False),
        ("NVTE_APPLY_QK_LAYER_SCALING", "1", True),
    ],
)
def test_a_switch_of_the_attention_is_named(name: str, value: str, named: bool) -> None:
    assert any(name in fault for fault in site_faults(recipe(), {name: value})) is named


def test_a_trainer_on_gpus_refuses_what_a_site_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    from gspo_megatron.policy import specs

    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    monkeypatch.setattr(specs, "cuda_fault", lambda *_: "")
    monkeypatch.setattr(specs, "import_fault", lambda: "")
    with pytest.raises(SystemExit, match="NVTE_FLASH_ATTN=0"):
        specs.refuse_fallbacks(recipe())
    specs.refuse_fallbacks(load_recipe(Path("recipes/tiny_moe.yaml"), ["placement.gpu=cpu"]))


def test_deterministic_layers_get_the_variable_that_they_ask_for() -> None:
    """Source: megatron-core, extensions/transformer_engine.py, which ends with RuntimeError otherwise."""
    asked = trainer_variables(recipe("trainer.megatron.deterministic_mode=true"))
    assert asked[NONDETERMINISTIC] == "0" and NONDETERMINISTIC not in trainer_variables(recipe())
    package = find_spec("megatron.core")
    assert package is not None and package.origin is not None
    source = Path(package.origin).parent / "extensions" / "transformer_engine.py"
    assert f'os.getenv("{NONDETERMINISTIC}"' in source.read_text()


def test_the_older_runner_is_a_key() -> None:
    assert server_variables(recipe()) == {}
    assert server_variables(recipe("rollout.model_runner=v1")) == {RUNNER: "0"}
    assert server_variables(recipe("rollout.model_runner=v2")) == {RUNNER: "1"}


def test_vllm_reads_the_variable_of_its_runner() -> None:
    from vllm import envs

    assert RUNNER in envs.environment_variables


def test_flashinfer_finds_the_compiler_of_the_packages(tmp_path: Path) -> None:
    compiler = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.touch()
    found = compiler_variables(tmp_path)
    assert found["CUDA_HOME"] == str(tmp_path / "nvidia" / "cu13")
    assert found["PATH"].split(os.pathsep)[0] == str(compiler.parent)
    assert compiler_variables(tmp_path / "nothing") == {}


def test_compile_caches_lie_on_the_node() -> None:
    script = Path("launch/lib/start.sh").read_text()
    assert "FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$scratch/flashinfer}" in script


def test_the_plan_counts_what_is_taken() -> None:
    from gspo_megatron.plan.rules.resources import pinned_bytes

    assert [pinned_bytes(size) for size in (0, 3, 1 << 20)] == [0, 4, 1 << 20]
    large = (gpu_environment.ROUNDED_MIB << 20) + 1
    assert pinned_bytes(large) == large
