"""Single mistakes of users, each named under its key; and unusual recipes that are in order, none of them warned of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gspo_megatron.config import RecipeError
from gspo_megatron.config.presets import PRESETS
from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.rules.ranges import RANGES, findings
from gspo_megatron.types import Finding

R30, R235 = "qwen3_30b_a3b_gspo", "qwen3_235b_a22b_gspo"
LONG30, LONG235 = "qwen3_30b_a3b_gspo_100k", "qwen3_235b_a22b_gspo_100k"
YARN = "model.architecture.rope_scaling={rope_type: yarn, factor: 4.0, original_max_position_embeddings: 32768}"

# Recipe, key that has to be named, overrides.
MISTAKES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (R30, "rollout.servers", ("placement.gpus_per_node=4",)),
    (R30, "batch", ("batch.updates=256",)),
    (R30, "objective.clip_low", ("objective.clip_low=3e-3",)),
    (R30, "objective.clip_high", ("objective.clip_high=0.2",)),
    (R30, "objective.clip_low", ("objective.clip_high=4e-6", "objective.clip_low=3e-6")),
    (R30, "optimizer.lr", ("optimizer.lr=1e-9",)),
    (R30, "optimizer.lr", ("optimizer.lr=1e-3",)),
    (R30, "optimizer.betas.1", ("optimizer.betas=[0.9,1.2]",)),
    (R30, "optimizer.betas", ("optimizer.betas=[0.95,0.5]",)),
    (R30, "optimizer.eps", ("optimizer.eps=1e-2",)),
    (R30, "optimizer.weight_decay", ("optimizer.weight_decay=10",)),
    (R30, "optimizer.clip_grad", ("optimizer.clip_grad=1e-4",)),
    (R30, "optimizer.clip_grad", ("optimizer.clip_grad=1000",)),
    (R30, "optimizer.warmup_updates", ("optimizer.warmup_updates=600",)),
    (R30, "optimizer.warmup_updates", ("optimizer.warmup_updates=10000",)),
    (R30, "objective.kl_coefficient", ("objective.kl=k3", "objective.kl_coefficient=10")),
    (R30, "objective.kl_coefficient", ("objective.kl=k3", "objective.kl_coefficient=1e-9")),
    (R30, "objective.tis_cap", ("objective.correction=[tis]", "objective.tis_cap=1e3")),
    (R30, "objective.mask_high", ("objective.correction=[icepop]", "objective.mask_high=0.9")),
    (R30, "objective.trust_region_delta", ("objective.correction=[trust_region_mask]",
                                           "objective.trust_region_delta=50")),
    (R30, "trainer.context_parallel", ("objective.preset=minpro", "trainer.context_parallel=2")),
    (R30, "objective.veto_below", ("objective.correction=[veto]", "objective.veto_below=0.5")),
    (R30, "checkpoint.every", ("checkpoint.every=0", "placement.walltime_hours=4")),
    (R30, "checkpoint.every", ("checkpoint.every=200",)),
    (R30, "placement.disk_gib", ("checkpoint.keep=10", "placement.disk_gib=1000")),
    (R30, "placement.disk_gib", ("checkpoint.export_every=1", "placement.disk_gib=4000")),
    (R30, "checkpoint.keep", ("checkpoint.keep=100",)),
    (R30, "trainer.expert_parallel", ("placement.nodes=32", "rollout.servers=128", "trainer.expert_parallel=256")),
    (R30, "rollout.max_prompt_tokens", ("rollout.max_prompt_tokens=40000", "trainer.micro_batch_tokens=70720")),
    (R30, "rollout.max_answer_tokens", ("rollout.max_answer_tokens=40000", "trainer.micro_batch_tokens=70720")),
    (LONG30, "model.architecture.rope_scaling", (YARN,)),
    (R30, "model.path", ("model.path=models/Qwen3-235B-A22B",)),
    (R30, "model.path", ("model.path=models/our-own-70B-chat",)),
    (R30, "rollout.max_concurrency", ("rollout.max_concurrency=4",)),
    (R30, "rollout.max_concurrency", ("rollout.max_concurrency=16",)),
    (R30, "rollout.max_concurrency", ("rollout.max_concurrency=100000",)),
    (R30, "rollout.expected_answer_tokens", ("rollout.expected_answer_tokens=100",)),
    (R30, "rollout.max_staleness",
     ("placement.rollout_nodes=2", "rollout.servers=8", "rollout.max_staleness=40", "objective.correction=[tis]")),
    (R30, "rollout.over_provision", ("objective.group_filter=dynamic_sampling", "rollout.over_provision=0.5")),
    (R235, "rollout.start_timeout", ("rollout.start_timeout=20",)),
    (R235, "weight_update.timeout", ("weight_update.timeout=2",)),
    (R30, "weight_update.canary_bound", ("weight_update.canary_bound=1e-6",)),
    (R30, "weight_update.canary_bound", ("weight_update.canary_bound=100",)),
    (R30, "weight_update.bucket_mib", ("weight_update.bucket_mib=65536",)),
    (R30, "placement.walltime_hours", ("placement.walltime_hours=240",)),
    (R30, "placement.walltime_hours", ("placement.walltime_hours=0.5",)),
    (R30, "model.dtype", ("model.dtype=bf16",)),
    (R30, "placement.gpu", ("placement.gpu=v100",)),
    (R30, "objective.preset", ("objective.preset=",)),
    (R30, "objective.preset", ("objective.preset=a2c",)),
    (R30, "reward.bounds", ("reward.bounds=[1,0]",)),
    (R30, "optimizer.betas", ("optimizer.betas=[0.95,0.9]",)),
    (R30, "optimizer.final_fraction", ("optimizer.schedule=linear", "optimizer.final_fraction=1.0")),
    (R30, "objective.overlong_buffer", ("objective.overlong=soft", "objective.overlong_buffer=30720")),
    (R30, "objective.overlong_buffer", ("objective.overlong=soft", "objective.overlong_buffer=1")),
    (R30, "objective.aggregation_length", ("objective.preset=dr_grpo", "objective.aggregation_length=100")),
    (R30, "rollout.start_timeout", ("rollout.start_timeout=600000",)),
    (R30, "weight_update.timeout", ("weight_update.timeout=1e6",)),
    (R30, "rollout.max_prompt_tokens", ("rollout.max_prompt_tokens=16",)),
    (R30, "rollout.kv_cache_gib", ("rollout.kv_cache_gib=40",)),
    (R30, "batch.prompts", ("batch.prompts=12800",)),
    (R30, "checkpoint.export_every", ("checkpoint.export_every=1000",)),
    (R30, "data.prompt_key", ("data.prompt_key=answer",)),
    (R30, "model.architecture.tie_word_embeddings", ("model.architecture.tie_word_embeddings=true",)),
    (R30, "model.architecture.rms_norm_eps", ("model.architecture.rms_norm_eps=1e-5",)),
    ("tiny_moe", "optimizer.lr", ("optimizer.lr=1e-1",)),
    ("tiny_moe", "cold_start.lr", ("cold_start.lr=2",)),
    ("tiny_moe", "rollout.max_prompt_tokens", ("rollout.max_prompt_tokens=4",)),
    (R30, "evaluation.every", ("evaluation.problems=3000", "evaluation.every=1")),
    (R30, "evaluation.temperature", ("evaluation.temperature=6",)),
    (R30, "rollout.temperature", ("rollout.temperature=10",)),
    (R30, "rollout.tensor_parallel", ("rollout.tensor_parallel=16", "rollout.servers=2")),
    (LONG235, "trainer.distributed_optimizer", ("trainer.distributed_optimizer=false",)),
    (R30, "batch.updates", ("batch.updates=128",)),
    (R30, "batch.prompts", ("batch.prompts=4", "batch.answers=2", "batch.updates=1")),
    (R30, "batch.answers", ("batch.answers=1024",)),
    (LONG30, "model.architecture.rope_theta", ("model.architecture.rope_theta=1e4",)),
    (R30, "model.architecture.num_experts_per_tok", ("model.architecture.num_experts_per_tok=4",)),
    (R30, "model.architecture.norm_topk_prob", ("model.architecture.norm_topk_prob=false",)),
    (R235, "model.architecture.num_hidden_layers", ("model.architecture.num_hidden_layers=88",)),
    (R30, "rollout.gpu_memory_fraction", ("rollout.gpu_memory_fraction=0.2",)),
    (R30, "trainer.max_steps", ("trainer.max_steps=1000000",)),
    (R30, "trainer.max_skipped", ("trainer.max_skipped=10000",)),
    (R30, "trainer.head_chunk_tokens", ("trainer.head_chunk_tokens=1",)),
    (R30, "run.directory", ("run.directory=/tmp/run",)),
    (R30, "rollout.stream_interval", ("rollout.stream_interval=100000",)),
    (R30, "placement.power", ("placement.power=0.7",)),
    (R30, "placement.power", ("placement.power=10200",)),
    (R30, "placement.price", ("placement.price=3000",)),
    (R30, "placement.price", ("placement.price=0.01",)),
    (R30, "batch.answers", ("batch.answers=2",)),
    (R30, "batch.updates", ("batch.updates=64",)),
    (R30, "trainer.first_stage_layers", ("trainer.pipeline_parallel=4", "trainer.first_stage_layers=13")),
    (R30, "data.held_out_path", ("data.held_out_path=data/dapo_math_17k.jsonl",)),
    (R30, "rollout.prefix_caching", ("objective.replay=sampler", "rollout.prefix_caching=false")),
)  # fmt: skip

# A GPU like the H100, in the units of the keys; in each case one number in those of a data sheet.
SHEET = {"memory": 79.1, "flops": 989, "memory_bandwidth": 3350, "link": 450, "network": 50}
WRONG_UNITS = (
    {"memory": 81559}, {"network": 400}, {"flops": 1979}, {"link": 900}, {"memory_bandwidth": 3.35}, {"flops": 0.989},
)  # fmt: skip

# Recipes that somebody had a reason for. Acknowledged warnings and infos are in order.
VALID: tuple[tuple[str, tuple[str, ...]], ...] = (
    (R30, ("optimizer.lr=0",)),
    (R30, ("optimizer.lr=5e-7",)),
    (R30, ("optimizer.lr=1e-5",)),
    (R30, ("optimizer.lr=1e-7", "optimizer.warmup_updates=40")),
    (R30, ("optimizer.betas=[0.9,0.999]",)),
    (R30, ("optimizer.betas=[0.9,0.98]", "optimizer.eps=1e-15")),
    (R30, ("optimizer.weight_decay=0.1", "optimizer.clip_grad=0.2")),
    (R30, ("optimizer.schedule=cosine", "optimizer.final_fraction=0.1")),
    (R30, ("optimizer.clip_grad=10",)),
    (R30, ("objective.clip_low=2e-4", "objective.clip_high=2e-4")),
    (R30, ("objective.clip_low=1e-3", "objective.clip_high=1.5e-3")),
    (R30, ("objective.kl=k3", "objective.kl_coefficient=1e-3")),
    (R30, ("objective.kl=k2", "objective.kl_coefficient=0.04")),
    (R30, ("objective.kl=k1", "objective.kl_in=reward", "objective.kl_coefficient=0.2")),
    (R30, ("objective.preset=grpo",)),
    (R30, ("objective.preset=dapo",)),
    (R30, ("objective.preset=cispo",)),
    (R30, ("objective.preset=sapo",)),
    (R30, ("objective.preset=gmpo",)),
    (R30, ("objective.preset=rloo", "batch.updates=1")),
    (R30, ("objective.correction=[tis]", "objective.tis_cap=5")),
    (R30, ("objective.correction=[icepop]",)),
    (R30, ("objective.correction=[geometric_mask]",)),
    (R30, ("objective.correction=[trust_region_mask]",)),
    (R30, ("objective.correction=[veto]", "objective.veto_below=1e-6")),
    (R30, ("objective.overlong=filter",)),
    (R30, ("objective.overlong=soft", "objective.overlong_buffer=4096")),
    (R30, ("objective.group_filter=dynamic_sampling",)),
    (R30, ("batch.answers=64", "batch.prompts=32")),
    (R30, ("batch.prompts=512", "batch.updates=16")),
    (R30, ("batch.answers=4",)),
    (R30, ("rollout.temperature=0.6",)),
    (R30, ("rollout.temperature=1.2",)),
    (R30, ("rollout.max_concurrency=512",)),
    (R30, ("rollout.expected_answer_tokens=2000",)),
    (R30, ("placement.rollout_nodes=2", "rollout.servers=8", "rollout.max_staleness=4",
           "objective.correction=[tis]")),
    (R30, ("trainer.max_steps=0",)),
    (R30, ("placement.price=2.5", "placement.power=1400")),
    (R30, ("objective.preset=rloo", "batch.updates=1", "batch.answers=2", "batch.prompts=256")),
    (R30, ("trainer.max_steps=2000",)),
    (R30, ("checkpoint.every=20", "checkpoint.keep=5")),
    (R30, ("placement.walltime_hours=4",)),
    (R30, ("placement.walltime_hours=72", "placement.disk_gib=20000")),
    (R30, ("evaluation.every=0",)),
    (R30, ("evaluation.temperature=1.0", "evaluation.answers=64", "evaluation.every=50")),
    (R30, ("evaluation.problems=0",)),
    (R30, ("model.path=models/my-checkpoint",)),
    (R30, ("run.directory=/scratch/me/run",)),
    (R30, ("weight_update.bucket_mib=1024", "weight_update.timeout=120")),
    (R30, ("rollout.start_timeout=1800",)),
    (R30, ("objective.preset=dr_grpo", "objective.aggregation_length=8192")),
    (R30, ("optimizer.schedule=linear", "optimizer.final_fraction=0.5")),
    (R30, ("rollout.max_prompt_tokens=1024",)),
    (R235, ("trainer.virtual_pipeline=4",)),
    (R30, ("trainer.megatron.moe_token_dispatcher_type=flex", "trainer.expert_parallel=16")),
    ("tiny_moe", ("optimizer.lr=2e-3",)),
    (LONG30, ("placement.gpu=h200",)),
    (R235, ("model.path=models/Qwen3-235B-A22B-our-sft",)),
    ("tiny_moe", ("optimizer.lr=3e-4",)),
    ("tiny_moe", ("checkpoint.every=0",)),
    ("tiny_moe", ("batch.prompts=16", "batch.answers=4", "batch.updates=2")),
    ("tiny_moe", ("rollout.max_concurrency=64",)),
    ("qwen3_0p6b_gspo", ("optimizer.lr=3e-6",)),
)  # fmt: skip
LEFT = {"gspo-inert", "ratio-inert"}
"""Warnings that ask for a reason on purpose, whatever the run is for."""


def found_in(recipe: str, overrides: tuple[str, ...]) -> list[Finding]:
    try:
        found = list(make_plan(load_recipe(Path(f"recipes/{recipe}.yaml"), overrides)).findings)
    except RecipeError as error:
        found = list(error.findings)
    # A recipe says null, true and false.
    assert not re.search(r"\b(None|True|False)\b", "\n".join(map(str, found)))
    return found


@pytest.mark.parametrize(("recipe", "key", "overrides"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_named_with_its_key(recipe: str, key: str, overrides: tuple[str, ...]) -> None:
    found = [finding for finding in found_in(recipe, overrides) if finding.severity != "info"]
    assert key in {finding.key for finding in found}, "\n".join(map(str, found))


@pytest.mark.parametrize(("recipe", "overrides"), VALID, ids=lambda value: str(value)[:60])
def test_an_unusual_recipe_is_not_warned_of(recipe: str, overrides: tuple[str, ...]) -> None:
    found = [one for one in found_in(recipe, overrides) if one.severity != "info" and one.code not in LEFT]
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("wrong", [{}, *WRONG_UNITS], ids=str)
def test_a_data_sheet_in_other_units_is_named(wrong: dict[str, float]) -> None:
    given = ", ".join(f"{key}: {value}" for key, value in {**SHEET, **wrong}.items())
    found = found_in(R30, ("placement.gpu=null", f"placement.device={{{given}}}"))
    named = {one.key for one in found if one.key.startswith("placement.device")}
    assert named == {f"placement.device.{key}" for key in wrong}


def test_a_temperature_far_from_one_is_worth_a_word() -> None:
    said = {value: [one.code for one in found_in(R30, (f"rollout.temperature={value}",))] for value in (0.6, 0.9, 1.0)}
    assert [value for value, codes in said.items() if "temperature-off-one" in codes] == [0.6]


def test_a_fix_is_not_what_the_recipe_has() -> None:
    """Nor the wrong way."""
    servers = ("rollout.tensor_parallel=1", "rollout.pipeline_parallel=7", "rollout.servers=4")
    fixes = [one.fix for one in found_in(R30, servers) if one.code == "idle-rollout-gpus"]
    assert fixes == ["choose rollout.tensor_parallel x rollout.pipeline_parallel as a divisor of 32"]
    slow = ("batch.prompts=8192", "batch.answers=64", "checkpoint.every=2")
    (far,) = [one.fix for one in found_in(R30, slow) if one.code == "checkpoints-far-apart"]
    assert far.startswith("set it to 1, about ") and float(far.split()[-2]) > 12
    (far,) = [one.fix for one in found_in(R30, (*slow, "checkpoint.every=1")) if one.code == "checkpoints-far-apart"]
    assert "set it" not in far
    whole = ("rollout.tensor_parallel=1", "rollout.servers=32", "placement.device={memory: 70, flops: 989, "
             "memory_bandwidth: 3350, link: 450, network: 50}", "placement.gpu=null")  # fmt: skip
    (update,) = [one for one in found_in(R30, whole) if one.message.startswith("weight update")]
    assert update.key == "rollout.tensor_parallel" and update.fix.startswith("raise it")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_lies_within_the_ranges(preset: str) -> None:
    recipe = load_recipe(Path("recipes/qwen3_30b_a3b_gspo.yaml"), [f"objective.preset={preset}"])
    spec = recipe.objective.spec(recipe.rollout.max_answer_tokens)
    plan = make_plan(recipe)
    assert list(findings(recipe, recipe.arch, plan.machine, spec)) == []


def test_every_range_is_of_a_key_and_has_room() -> None:
    known = load_recipe(Path("recipes/tiny_moe.yaml"))
    for row in RANGES:
        assert row.low < row.high and row.source
        section, name = row.key.split(".")[:2]
        assert name == "architecture" or name in type(getattr(known, section)).model_fields, row.key
