"""Servers that hold fp8: what the plan refuses, warns of and counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.engine_text import explain_engines
from gspo_megatron.plan.run_plan import Plan

R30B, TINY = "recipes/qwen3_30b_a3b_gspo.yaml", "recipes/tiny_moe.yaml"
FP8 = ("rollout.weight_dtype=fp8", "weight_update.canary_bound=3", "objective.correction=[tis]")


def plan(*overrides: str, path: str = R30B) -> Plan:
    return make_plan(load_recipe(Path(path), list(overrides)))


def named(*overrides: str, path: str = R30B) -> dict[str, str]:
    """Code and key of the errors and warnings that a recipe does not have without fp8."""
    plain = [one for one in overrides if one not in FP8[:2]]
    findings, before = (plan(*given, path=path).findings for given in (overrides, plain))
    known = {(finding.code, finding.key) for finding in before}
    return {one.code: one.key for one in findings if one.severity != "info" and (one.code, one.key) not in known}


def test_a_recipe_that_fits_raises_nothing() -> None:
    assert named(*FP8) == {}


@pytest.mark.parametrize(
    ("change", "code", "key"),
    [
        ("placement.gpu=a100", "fp8-needs-gpu", "rollout.weight_dtype"),
        ("model.dtype=float32", "fp8-type", "rollout.weight_dtype"),
        ("rollout.vllm.moe_backend=batched_triton", "server-refuses", "rollout.vllm.moe_backend"),
        ("rollout.tensor_parallel=4", "fp8-blocks", "rollout.tensor_parallel"),
    ],
)
def test_what_servers_cannot_hold_is_refused(change: str, code: str, key: str) -> None:
    assert named(*FP8, change).get(code) == key


def test_whole_experts_are_no_cut_blocks() -> None:
    assert "fp8-blocks" not in named(*FP8, "rollout.tensor_parallel=4", "rollout.expert_parallel=true")


def test_no_fp8_without_a_gpu() -> None:
    assert named(FP8[0], path=TINY)["fp8-needs-gpu"] == "rollout.weight_dtype"


def test_what_follows_from_rounded_log_probs_is_named() -> None:
    assert named(FP8[0], FP8[2]) == {"canary-below-fp8": "weight_update.canary_bound"}
    assert named(FP8[0], FP8[1]) == {"sampler-rounds-weights": "rollout.weight_dtype"}
    found = named(FP8[0], FP8[1], "objective.ratio_reference=sampler")
    assert found["sampler-rounds-weights"] == "objective.ratio_reference"


def test_memory_update_and_decoding_are_counted() -> None:
    """Of the 30B 0.62 B values of embedding and head and 12.6 M of routers stay in bfloat16."""
    plain, fp8 = plan().rollout, plan(*FP8).rollout
    assert plain and fp8
    assert 0.505 < fp8.weight_bytes / plain.weight_bytes < 0.52
    assert fp8.kv_room - plain.kv_room == plain.weight_bytes - fp8.weight_bytes
    assert fp8.tokens_per_second > plain.tokens_per_second
    before, after = plan().compute, plan(*FP8).compute
    assert before and after and after.seconds["weight update"] < before.seconds["weight update"]


def test_the_engine_gets_the_form_and_the_reason_is_shown() -> None:
    rows = {row.name: row for row in explain_engines(load_recipe(Path(R30B), list(FP8)))}
    assert rows["hf_overrides"].value["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    assert "rollout.weight_dtype" in rows["hf_overrides"].why
