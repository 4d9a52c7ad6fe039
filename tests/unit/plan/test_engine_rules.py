"""Arguments of Megatron and vLLM beside the rest of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.engine_text import explain_engines, print_engines

GPU = "recipes/qwen3_30b_a3b_gspo.yaml"
DENSE = "recipes/qwen3_0p6b_gspo.yaml"
TINY = "recipes/tiny_moe.yaml"


def codes(path: str, *overrides: str) -> dict[str, str]:
    """Code of each error and warning, and its key."""
    findings = make_plan(load_recipe(Path(path), list(overrides))).findings
    return {finding.code: finding.key for finding in findings if finding.severity != "info"}


@pytest.mark.parametrize(
    ("path", "override", "code"),
    [
        (TINY, "trainer.megatron.moe_token_dispatcher_type=flex", "engine-needs-gpu"),
        (TINY, "rollout.vllm.cudagraph_capture_sizes=[1]", "engine-needs-gpu"),
        (TINY, "rollout.model_runner=v1", "engine-needs-gpu"),
        (GPU, "trainer.megatron.bucket_size=1000", "engine-inert"),
        (GPU, "trainer.megatron.moe_flex_dispatcher_num_sms=20", "engine-inert"),
        (GPU, "trainer.megatron.recompute_modules=[moe]", "engine-inert"),
        (DENSE, "trainer.megatron.cp_comm_type=p2p", "engine-inert"),
        (DENSE, "trainer.megatron.moe_permute_fusion=false", "engine-inert"),
        (DENSE, "rollout.vllm.moe_backend=triton", "engine-inert"),
        ("recipes/qwen3_30b_a3b_gspo_100k.yaml", "trainer.megatron.cp_comm_type=a2a", "engine-layout"),
        (GPU, "rollout.vllm.kv_cache_dtype=fp8", "sampler-rounds-keys"),
    ],
)
def test_what_does_not_fit_is_named(path: str, override: str, code: str) -> None:
    assert codes(path, override).get(code) == override.partition("=")[0]


@pytest.mark.parametrize(
    "override",
    [
        "trainer.megatron={overlap_grad_reduce: true, bucket_size: 100000000}",
        "trainer.megatron={moe_token_dispatcher_type: flex, moe_flex_dispatcher_backend: hybridep}",
        "trainer.megatron.cp_comm_type=a2a",
        "rollout.model_runner=v1",
        "rollout.vllm={max_num_batched_tokens: 16384, cudagraph_capture_sizes: [1, 2, 4], async_scheduling: false}",
    ],
)
def test_what_fits_raises_nothing(override: str) -> None:
    assert codes(GPU, override) == {}


@pytest.mark.parametrize(("key", "value"), [("head_dim", 16), ("hidden_size", 48)])
def test_shapes_that_a_cpu_server_refuses_are_named(key: str, value: int) -> None:
    override = f"model.architecture.{key}={value}"
    assert any(code.startswith("cpu-") for code in codes(TINY, override, "placement.gpu=cpu"))
    assert not any(code.startswith("cpu-") for code in codes(TINY, override, "placement.gpu=h100"))


@pytest.mark.parametrize("gpu", ["b200", "b300", "gb200"])
def test_padded_experts_are_refused(gpu: str) -> None:
    """Experts of 768 over 4 ranks are 192 wide; vLLM makes them 256 there."""
    base = [f"placement.gpu={gpu}", "placement.gpus_per_node=4", "rollout.tensor_parallel=4", "rollout.servers=4"]
    assert codes(GPU, *base)["experts-padded"] == "rollout.tensor_parallel"
    for remedy in ("rollout.expert_parallel=true", "rollout.vllm.moe_backend=triton", "rollout.tensor_parallel=2"):
        assert "experts-padded" not in codes(GPU, *base, remedy)
    assert "experts-padded" not in codes(GPU, *base, "placement.gpu=h200")


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_setting_of_a_shipped_recipe_has_a_reason(path: Path) -> None:
    rows = explain_engines(load_recipe(path))
    assert {row.engine for row in rows} == {"megatron", "vllm"}
    assert all(len(row.why) > 5 and len(row.source) > 3 and row.value != row.default for row in rows)


def test_what_the_recipe_passes_on_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["trainer.megatron.overlap_grad_reduce=true", "rollout.vllm.moe_backend=triton"]
    print_engines(load_recipe(Path(GPU), overrides))
    text = capsys.readouterr().out
    assert "overlap_grad_reduce" in text and "recipe: rollout.vllm.moe_backend" in text
