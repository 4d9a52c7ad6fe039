"""What a shipped recipe leaves at the library's default although others set it, and the shares that this claims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gspo_megatron.cluster.machines import machine_of
from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.engine_text import explain_engines, kept_defaults, print_engines
from gspo_megatron.plan.estimate import decode
from gspo_megatron.plan.estimate.calibration import CALIBRATED
from gspo_megatron.plan.estimate.practice import Practice, practice_of
from gspo_megatron.plan.estimate.trainer_time import trainer_times
from gspo_megatron.plan.rules.context_exchange import other_kinds
from gspo_megatron.plan.suggest import apply

GPU = ("qwen3_30b_a3b_gspo", "qwen3_30b_a3b_gspo_100k", "qwen3_235b_a22b_gspo", "qwen3_235b_a22b_gspo_100k")
DENSE = "qwen3_0p6b_gspo"
REACHED_FOR = {
    "megatron": "moe_token_dispatcher_type overlap_grad_reduce bucket_size overlap_param_gather moe_permute_fusion "
    "moe_router_fusion cp_comm_type use_precision_aware_optimizer optimizer_cpu_offload cuda_graph_impl "
    "overlap_moe_expert_parallel_comm delay_wgrad_compute gradient_accumulation_fusion apply_rope_fusion",
    "vllm": "quantization kv_cache_dtype speculative_config max_num_batched_tokens moe_backend optimization_level "
    "cudagraph_capture_sizes async_scheduling enforce_eager",
}
"""Settings that an expert reaches for on a mixture of experts."""


def path_of(name: str) -> Path:
    return Path(f"recipes/{name}.yaml")


@pytest.mark.parametrize("name", GPU)
def test_everything_an_expert_reaches_for_is_set_or_explained(name: str) -> None:
    recipe = load_recipe(path_of(name))
    named = {(row.engine, row.name) for row in [*explain_engines(recipe), *kept_defaults(recipe)]}
    wanted = {(engine, key) for engine, keys in REACHED_FOR.items() for key in keys.split()}
    wanted |= {("megatron", "tp_comm_overlap")} if recipe.trainer.tensor_parallel > 1 else set()
    assert wanted <= named


def test_no_row_says_what_is_not_so() -> None:
    """A key that the recipe sets is among what differs only; keys of experts are no matter of a dense model."""
    recipe = load_recipe(path_of(GPU[0]), ["trainer.megatron.overlap_grad_reduce=true"])
    assert "overlap_grad_reduce" not in {row.name for row in kept_defaults(recipe)}
    dense = {row.name for row in kept_defaults(load_recipe(path_of(DENSE)))}
    assert dense and not {"moe_router_fusion", "moe_backend", "cp_comm_type", "tp_comm_overlap"} & dense
    assert kept_defaults(load_recipe(path_of("tiny_moe"))) == []
    rounded = load_recipe(path_of(GPU[0]), ["rollout.weight_dtype=fp8"])
    assert "quantization" not in {row.name for row in kept_defaults(rounded)}


def test_both_parts_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_engines(load_recipe(path_of(GPU[2])))
    first, _, second = capsys.readouterr().out.partition("left at the library's default")
    assert "moe_permute_fusion" in first and "tp_comm_overlap" in second and "Source: " in second


def share(name: str, practice: Practice) -> float:
    """Share of a step that the trainer would save."""
    plan = make_plan(load_recipe(path_of(name)))
    assert plan.compute and plan.layout and plan.batch
    usual, other = (
        sum(time.seconds for time in trainer_times(plan.recipe, plan.layout, plan.batch, plan.machine, one).values())
        for one in (practice_of(plan.recipe), practice)
    )
    return (usual - other) / plan.compute.seconds_per_step


def exchange_shares(name: str) -> list[float]:
    """Share of a step that each other way to meet keys and values would save."""
    recipe = load_recipe(path_of(name))
    plans = [
        make_plan(apply(recipe, change))
        for change in [{}, *other_kinds(recipe.trainer, recipe.arch, machine_of(recipe))]
    ]
    usual, *others = [plan.compute.seconds_per_step for plan in plans if plan.compute]
    assert len(others) >= 1
    return [1 - other / usual for other in others]


@pytest.mark.parametrize("name", GPU)
def test_the_shares_of_a_step_are_those_that_the_rows_claim(name: str) -> None:
    ours = practice_of(load_recipe(path_of(name)))
    assert 0 <= share(name, replace(ours, overlaps_reduction=True)) <= 0.0021
    assert 0 <= share(name, replace(ours, overlaps_gather=True)) <= 0.0011
    assert 0.01 <= share(name, replace(ours, dispatch="overlapped")) <= 0.055
    assert 0.005 <= share(name, replace(ours, dispatch="fused")) <= 0.035
    assert max(exchange_shares(name)) <= 0.01
    assert 0 <= share(name, replace(ours, rates=replace(CALIBRATED, layer_seconds=0.0))) <= 0.02


@pytest.mark.parametrize("name", [DENSE, *GPU])
def test_float8_keys_save_what_the_row_claims(name: str) -> None:
    plain, half = (
        make_plan(load_recipe(path_of(name), more)).compute for more in ([], ["rollout.vllm.kv_cache_dtype=fp8"])
    )
    assert plain and half
    assert 0.065 <= 1 - half.seconds_per_step / plain.seconds_per_step <= 0.28


@pytest.mark.parametrize("name", [DENSE, *GPU])
def test_float8_weights_save_what_the_row_claims(name: str) -> None:
    """Where a server's cuts are no multiples of the blocks, its experts are spread, which changes no time."""
    spread = [] if name == DENSE else ["rollout.expert_parallel=true"]
    fp8 = ["rollout.weight_dtype=fp8", "weight_update.canary_bound=3"]
    plain, half = (make_plan(load_recipe(path_of(name), more + spread)) for more in ([], fp8))
    assert plain.compute and half.compute and not half.refused
    assert 0.004 <= 1 - half.compute.seconds_per_step / plain.compute.seconds_per_step <= 0.165


@pytest.mark.parametrize("name", [DENSE, *GPU])
def test_graphs_and_steps_of_prompts_do_what_the_rows_claim(name: str) -> None:
    plan = make_plan(load_recipe(path_of(name)))
    assert plan.compute and plan.rollout
    eager = make_plan(load_recipe(path_of(name), ["rollout.vllm.enforce_eager=true"])).compute
    assert eager and 1 <= eager.seconds_per_step / plan.compute.seconds_per_step <= 1.575
    prompts = plan.recipe.batch.prompts / plan.recipe.rollout.servers
    read = decode.prefill_seconds(plan.recipe, plan.recipe.arch, plan.machine, prompts)
    assert read < 0.001 * plan.rollout.seconds
