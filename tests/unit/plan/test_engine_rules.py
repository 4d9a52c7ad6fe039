"""Arguments of Megatron and vLLM beside the rest of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.cli import main
from gspo_megatron.cluster.exit_codes import REFUSED
from gspo_megatron.config import RecipeError
from gspo_megatron.models import load_recipe
from gspo_megatron.models.megatron_engine import data_parallel_arguments, optimizer_arguments, transformer_arguments
from gspo_megatron.models.vllm_engine import engine_arguments
from gspo_megatron.plan import engine_reasons, make_plan
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
        (TINY, "trainer.megatron.cp_comm_type=p2p", "engine-needs-gpu"),
        (TINY, "rollout.vllm.cudagraph_capture_sizes=[1]", "engine-needs-gpu"),
        (TINY, "rollout.model_runner=v1", "engine-needs-gpu"),
        (GPU, "trainer.megatron.bucket_size=1000", "engine-inert"),
        (GPU, "trainer.megatron.moe_flex_dispatcher_num_sms=20", "engine-inert"),
        (GPU, "trainer.megatron.recompute_modules=[moe]", "engine-inert"),
        (DENSE, "trainer.megatron.cp_comm_type=p2p", "engine-inert"),
        (DENSE, "trainer.megatron.moe_permute_fusion=false", "engine-inert"),
        (DENSE, "rollout.vllm.moe_backend=triton", "engine-inert"),
        ("recipes/qwen3_30b_a3b_gspo_100k.yaml", "trainer.megatron.cp_comm_type=a2a", "engine-layout"),
        (GPU, "trainer.megatron.hierarchical_context_parallel_sizes=[2, 2]", "engine-inert"),
        (GPU, "rollout.vllm.kv_cache_dtype=fp8", "sampler-rounds-keys"),
        (GPU, "rollout.vllm.numa_bind_nodes=[0, 1]", "engine-inert"),
        (GPU, "rollout.vllm.max_num_batched_tokens=127", "server-refuses"),
        (GPU, "rollout.vllm.block_size=24", "server-refuses"),
        (GPU, "rollout.vllm.num_gpu_blocks_override=2048", "server-refuses"),
        (TINY, "rollout.vllm.num_gpu_blocks_override=1", "server-refuses"),
        (GPU, "rollout.vllm.attention_backend=FLASH_ATTN_MLA", "server-refuses"),
        (GPU, "rollout.vllm.attention_backend=CPU_ATTN", "server-refuses"),
        (GPU, "rollout.vllm.attention_config={backend: TRITON_MLA}", "server-refuses"),
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
        "trainer.megatron.flash_attention_version=3",
        "rollout.vllm={numa_bind: true, numa_bind_nodes: [0, 1]}",
        "rollout.vllm={block_size: 32, num_gpu_blocks_override: 1025, attention_backend: FLASHINFER}",
        "rollout.vllm={max_num_batched_tokens: 32768, enable_chunked_prefill: false}",
        "rollout.vllm={max_num_batched_tokens: 16384, cudagraph_capture_sizes: [1, 2, 4], async_scheduling: false}",
    ],
)
def test_what_fits_raises_nothing(override: str) -> None:
    assert codes(GPU, override) == {}


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["cp_comm_type=all_gather"], None),
        (["cp_comm_type=a2a"], "8 ranks (TP x CP) whole heads, and the model has 4"),
        (["cp_comm_type=a2a+p2p"], "needs two numbers above 1 that make context_parallel=8"),
        (["cp_comm_type=a2a+p2p", "hierarchical_context_parallel_sizes=[2, 4]"], None),
        (["cp_comm_type=a2a+p2p", "hierarchical_context_parallel_sizes=[4, 2]"], None),
        (["cp_comm_type=a2a+p2p", "hierarchical_context_parallel_sizes=[4, 2]", "TP2"], "8 ranks (TP x the first"),
        (["cp_comm_type=a2a+p2p", "hierarchical_context_parallel_sizes=[8, 1]"], "two numbers above 1"),
        (["cp_comm_type=a2a+p2p", "hierarchical_context_parallel_sizes=[2, 2]"], "context_parallel=8"),
        (
            ["cp_comm_type=a2a+p2p", "hierarchical_context_parallel_sizes=[2, 4]", "flash_attention_version=4"],
            "flash-attention 4",
        ),
    ],
)
def test_each_way_to_meet_keys_and_values_has_its_layouts(overrides: list[str], fault: str | None) -> None:
    keys = ["trainer.tensor_parallel=2" if one == "TP2" else f"trainer.megatron.{one}" for one in overrides]
    recipe = load_recipe(Path(GPU), ["trainer.context_parallel=8", "trainer.tensor_parallel=1", *keys])
    errors = [one.message for one in make_plan(recipe).findings if one.code == "engine-layout"]
    assert errors == [] if fault is None else fault in errors[0] and len(errors) == 1


def test_two_levels_take_no_packs_that_fewer_ranks_share() -> None:
    keys = ["cp_comm_type=a2a+p2p", "hierarchical_context_parallel_sizes=[2, 2]"]
    overrides = [*(f"trainer.megatron.{one}" for one in keys), "trainer.context_parallel=4"]
    dynamic = "trainer.dynamic_context_parallel=true"
    assert "engine-layout" not in codes(GPU, *overrides)
    assert codes(GPU, *overrides, dynamic)["engine-layout"] == "trainer.megatron.cp_comm_type"
    assert "engine-layout" not in codes(GPU, "trainer.context_parallel=4", "trainer.megatron.cp_comm_type=a2a", dynamic)


def test_prompts_that_may_not_be_cut_need_a_step_that_holds_a_sequence() -> None:
    found = codes(GPU, "rollout.vllm={max_num_batched_tokens: 32767, enable_chunked_prefill: false}")
    assert found == {"server-refuses": "rollout.vllm.max_num_batched_tokens"}


@pytest.mark.parametrize(("gpu", "runs"), [("a100", {2}), ("h100", {2, 3, 4}), ("b200", {2, 4})])
def test_flash_attention_has_kernels_for_the_gpu(gpu: str, runs: set[int]) -> None:
    key = "trainer.megatron.flash_attention_version"
    for version in (2, 3, 4):
        named = codes(GPU, f"placement.gpu={gpu}", f"{key}={version}").get("engine-gpu")
        assert named == (None if version in runs else key)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("trainer.megatron.recompute_method=block", "not planned"),
        ("trainer.megatron.recompute_num_layers=4", "not planned"),
        ("rollout.vllm.all2all_backend=deepep_v2", "data-parallel ranks of an engine"),
    ],
)
def test_what_the_plan_does_not_count_is_refused_with_the_reason(override: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        load_recipe(Path(GPU), [override])


@pytest.mark.parametrize(("key", "value"), [("head_dim", 16), ("hidden_size", 48)])
def test_shapes_that_a_cpu_server_refuses_are_named(key: str, value: int) -> None:
    override = f"model.architecture.{key}={value}"
    assert any(code.startswith("cpu-") for code in codes(TINY, override, "placement.gpu=cpu"))
    assert not any(code.startswith("cpu-") for code in codes(TINY, override, "placement.gpu=h100"))


@pytest.mark.parametrize("gpu", ["b200", "b300", "gb200"])
def test_padded_experts_are_said_and_counted(gpu: str) -> None:
    """Experts of 768 over 4 ranks are 192 wide; vLLM makes them 256 there."""
    base = [f"placement.gpu={gpu}", "placement.gpus_per_node=4", "rollout.tensor_parallel=4", "rollout.servers=4"]
    assert codes(GPU, *base)["experts-padded"] == "rollout.tensor_parallel"
    remedies = ("rollout.expert_parallel=true", "rollout.vllm.moe_backend=triton", "rollout.tensor_parallel=2")
    for remedy in remedies:
        assert "experts-padded" not in codes(GPU, *base, remedy)
    assert "experts-padded" not in codes(GPU, *base, "placement.gpu=h200")
    # 48 layers of 128 experts, 3 matrices of 2048 x 64 values of padding, two bytes each.
    padding = 48 * 128 * 3 * 2048 * 64 * 2
    plans = [make_plan(load_recipe(Path(GPU), [*base, *more])).rollout for more in ([], [remedies[1]])]
    assert plans[0] and plans[1] and plans[1].kv_room - plans[0].kv_room == padding


def test_experts_of_another_type_are_refused_on_blackwell() -> None:
    base = ["placement.gpu=b200", "model.dtype=float32"]
    assert codes(GPU, *base)["experts-type"] == "model.dtype"
    assert "experts-type" not in codes(GPU, *base, "rollout.vllm.moe_backend=triton")


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_setting_of_a_shipped_recipe_has_a_reason(path: Path) -> None:
    rows = explain_engines(load_recipe(path))
    assert {row.engine for row in rows} == {"megatron", "vllm"}
    assert all(len(row.why) > 5 and len(row.source) > 3 and row.value != row.default for row in rows)


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_argument_has_a_reason_whatever_its_value(path: Path) -> None:
    recipe = load_recipe(path)
    trainer, dtype = recipe.trainer, recipe.model.dtype
    for gpu in (False, True):
        megatron = transformer_arguments(recipe.arch, trainer, dtype, gpu) | optimizer_arguments(
            recipe.optimizer, dtype, gpu
        )
        assert {*megatron, *data_parallel_arguments(trainer, dtype, gpu)} <= {*engine_reasons.MEGATRON}
        assert {*engine_arguments(recipe, Path("model"), gpu, sleeps=gpu)} <= {*engine_reasons.VLLM}


def test_settings_of_a_refused_recipe_are_not_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", GPU, "--explain-engines", "rollout.vllm.block_size=7"]) == REFUSED
    said = capsys.readouterr()
    assert "block_size" in said.out + said.err and "Source:" not in said.out


@pytest.mark.parametrize(
    ("overrides", "name", "said"),
    [
        (
            ["cudagraph_capture_sizes=[1, 4]", "max_cudagraph_capture_size=8"],
            "max_cudagraph_capture_size",
            "largest of",
        ),
        (["max_cudagraph_capture_size=0"], "max_cudagraph_capture_size", "no size of a graph"),
        (["enforce_eager=true", "cudagraph_capture_sizes=[1]"], "cudagraph_capture_sizes", "no graph is captured"),
        (
            ["attention_backend=FLASH_ATTN", "attention_config={backend: FLASHINFER}"],
            "attention_config",
            "a second time",
        ),
        (["attention_backend=FLEX_ATTENTION", "kv_cache_dtype=fp8"], "kv_cache_dtype", "has no kernels for fp8"),
        (["attention_backend=FLASH_ATTN", "kv_cache_dtype=fp8_e5m2"], "kv_cache_dtype", "has no kernels for fp8_e5m2"),
    ],
)
def test_what_vllm_refuses_at_its_start_is_refused_in_the_plan(overrides: list[str], name: str, said: str) -> None:
    findings = make_plan(load_recipe(Path(GPU), [f"rollout.vllm.{one}" for one in overrides])).findings
    assert [one.key for one in findings if one.code == "server-refuses" and said in one.message] == [
        f"rollout.vllm.{name}"
    ]


def test_keys_in_fp8_follow_the_gpu_and_the_weights() -> None:
    flash = ["rollout.vllm.attention_backend=FLASH_ATTN", "rollout.vllm.kv_cache_dtype=fp8_e4m3"]
    assert "server-refuses" not in codes(GPU, *flash)
    assert codes(GPU, *flash, "placement.gpu=a100")["server-refuses"] == "rollout.vllm.kv_cache_dtype"
    weights = ["rollout.weight_dtype=fp8", "weight_update.canary_bound=3"]
    assert "server-refuses" in codes(GPU, *weights, "rollout.vllm.kv_cache_dtype=fp8_e5m2")
    assert "server-refuses" not in codes(GPU, *weights, "rollout.vllm.kv_cache_dtype=fp8_e4m3")


def test_two_kinds_of_activation_are_refused() -> None:
    te, fused = (f"trainer.megatron.{name}" for name in ("use_te_activation_func=true", "bias_activation_fusion=false"))
    assert codes(GPU, te)["engine-layout"] == "trainer.megatron.use_te_activation_func"
    assert "engine-layout" not in codes(GPU, te, fused)


def test_the_fix_of_cut_blocks_is_for_what_is_cut() -> None:
    cut = ["rollout.weight_dtype=fp8", "weight_update.canary_bound=3"]
    (attention,) = [one for one in make_plan(load_recipe(Path(TINY), cut)).findings if one.code == "fp8-blocks"]
    assert "proj" in attention.message and "expert_parallel" not in attention.fix


def test_what_the_recipe_sets_to_the_library_s_default_is_shown() -> None:
    rows = explain_engines(load_recipe(Path(GPU), ["trainer.megatron.moe_permute_fusion=false"]))
    (row,) = [row for row in rows if row.name == "moe_permute_fusion"]
    assert row.value is False and row.source == "recipe: trainer.megatron.moe_permute_fusion"


def test_what_the_recipe_passes_on_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["trainer.megatron.overlap_grad_reduce=true", "rollout.vllm.moe_backend=triton"]
    print_engines(load_recipe(Path(GPU), overrides))
    text = capsys.readouterr().out
    assert "overlap_grad_reduce" in text and "recipe: rollout.vllm.moe_backend" in text
