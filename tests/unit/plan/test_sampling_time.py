"""Planned seconds of sampling, of evaluations and of the weight update; the bytes of the KV cache."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.estimate import decode
from gspo_megatron.plan.estimate.calibration import CALIBRATED
from gspo_megatron.plan.estimate.rollout import RolloutPlan
from gspo_megatron.plan.estimate.step_time import ComputePlan
from gspo_megatron.plan.run_plan import Plan

A3B, A22B = Path("recipes/qwen3_30b_a3b_gspo.yaml"), Path("recipes/qwen3_235b_a22b_gspo_100k.yaml")
BOTH = pytest.mark.parametrize("path", [A3B, A22B], ids=["30B-A3B", "235B-A22B"])
ONE_EACH = ("evaluation.every=1", "evaluation.problems=30", "evaluation.answers=1")


def planned(path: Path, *overrides: str) -> Plan:
    return make_plan(load_recipe(path, list(overrides)))


def servers(path: Path, *overrides: str) -> RolloutPlan:
    found = planned(path, *overrides).rollout
    assert found is not None
    return found


def work(path: Path, *overrides: str) -> ComputePlan:
    found = planned(path, *overrides).compute
    assert found is not None
    return found


@BOTH
def test_an_evaluation_takes_at_least_as_long_as_its_longest_response_alone(path: Path) -> None:
    plan = planned(path, *ONE_EACH)
    assert plan.compute is not None
    alone = decode.step_seconds(plan.recipe, plan.recipe.arch, plan.machine, 1, 0)
    assert plan.compute.seconds["evaluation"] >= plan.recipe.rollout.max_answer_tokens * alone


@BOTH
def test_an_evaluation_does_not_depend_on_the_batch(path: Path) -> None:
    few, many = (work(path, *ONE_EACH, f"batch.prompts={count}").seconds for count in (64, 256))
    assert few["evaluation"] == many["evaluation"] and few["rollout"] < many["rollout"]


def test_an_evaluation_as_large_as_the_batch_takes_as_long() -> None:
    seconds = work(A3B, "evaluation.every=1", "evaluation.problems=128", "evaluation.answers=16").seconds
    assert seconds["evaluation"] == seconds["rollout"]
    assert work(A3B, "evaluation.every=5", "evaluation.problems=0").seconds["evaluation"] == 0


@pytest.mark.parametrize(
    "more", ["batch.prompts=128", "batch.prompts=16", "rollout.pipeline_parallel=2 rollout.servers=8"]
)
@BOTH
def test_more_responses_at_a_time_are_never_slower(path: Path, more: str) -> None:
    change = [f"batch.prompts={load_recipe(path).batch.prompts}", *more.split()]
    found = [servers(path, *change, f"rollout.max_concurrency={most}") for most in (*range(1, 65), 96, 97, 128, 256)]
    assert [one.seconds for one in found] == sorted((one.seconds for one in found), reverse=True)


@BOTH
def test_more_memory_of_servers_is_never_slower(path: Path) -> None:
    found = [servers(path, f"rollout.gpu_memory_fraction={percent / 100}") for percent in range(60, 96)]
    assert found[0].concurrency < found[-1].concurrency
    assert [one.seconds for one in found] == sorted((one.seconds for one in found), reverse=True)


@BOTH
def test_a_cache_of_eight_bits_has_one_byte_an_element(path: Path) -> None:
    whole, half = (servers(path, f"rollout.vllm.kv_cache_dtype={kind}") for kind in ("auto", "fp8_e4m3"))
    assert half.kv_bytes_per_token * 2 == whole.kv_bytes_per_token
    assert half.answer_bytes * 2 == whole.answer_bytes and half.answers_at_limit >= 2 * whole.answers_at_limit
    assert half.kv_room == whole.kv_room and half.seconds < whole.seconds
    assert servers(path, "rollout.vllm.kv_cache_dtype=bfloat16") == whole


def test_gradients_are_not_moved_for_a_weight_update() -> None:
    """On shared GPUs they are freed: weights and optimizer states alone go to the host and back."""
    plan = planned(A3B)
    assert plan.memory is not None and plan.rollout is not None and plan.compute is not None
    parts = plan.memory[0].exact
    moved = sum(parts[f"{kind} {what}"] for kind in ("dense", "expert") for what in ("weights", "optimizer"))
    assert moved == pytest.approx(21.8e9, rel=2e-3)
    sent = plan.rollout.weight_bytes / (plan.machine.device.node_link * CALIBRATED.update_share)
    assert plan.compute.seconds["weight update"] == pytest.approx(sent + 2 * moved / CALIBRATED.host_link)


def test_what_the_distributed_optimizer_saves_counts_the_replicas_of_experts() -> None:
    """32 replicas of the dense parameters, 4 of an expert's."""
    plain, plan = planned(A3B), planned(A3B, "trainer.distributed_optimizer=false")
    assert plain.memory is not None and plan.memory is not None
    whole, cut = (
        sum(size for name, size in one[0].exact.items() if "optimizer" in name) / 1e9
        for one in (plan.memory, plain.memory)
    )
    finding = next(one for one in plan.findings if one.code == "optimizer-not-distributed")
    replicas = "each of 32 data-parallel ranks (4 of them for an expert)"
    assert finding.message == f"false: {replicas} holds the same optimizer states, {whole:.1f} GB"
    assert f"states take {cut:.1f} GB, 1/{whole / cut:.1f} of it" in finding.fix
    assert 4 < whole / cut < 32


@pytest.mark.parametrize("most", [8, 32, 128])
@pytest.mark.parametrize("count", [8, 16])
def test_sampling_takes_as_long_as_a_simulation_of_it(count: int, most: int) -> None:
    """Log-normal lengths, cut at the limit; whenever one ends the next begins. One wave and several."""
    plan = planned(
        A3B, f"rollout.max_concurrency={most}", f"rollout.servers={count}", "rollout.gpu_memory_fraction=0.95"
    )
    recipe, found = plan.recipe, plan.rollout
    assert found is not None and recipe.rollout.expected_answer_tokens
    random, limit = Random(count), recipe.rollout.max_answer_tokens
    drawn = [min(limit, random.lognormvariate(0, 0.69) * 8300) for _ in range(2048 // count)]
    scale = recipe.rollout.expected_answer_tokens * len(drawn) / sum(drawn)
    waiting, running = [scale * tokens for tokens in drawn], []
    seconds, now = 0.0, 0.0
    while waiting or running:
        while waiting and len(running) < found.concurrency:
            running.append((now + waiting.pop(), now))
        end = min(running)[0]
        seen = sum((now + end) / 2 - start for _, start in running) / len(running)
        seconds += (end - now) * decode.step_seconds(recipe, recipe.arch, plan.machine, len(running), seen)
        running.remove(min(running))
        now = end
    assert found.seconds == pytest.approx(seconds, rel=0.2)
