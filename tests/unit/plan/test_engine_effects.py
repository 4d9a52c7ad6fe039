"""The estimate knows each argument of Megatron and vLLM, or the plan says by name that it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config.engine_keys import MEGATRON_KEYS, NARROWED, VLLM_KEYS
from gspo_megatron.config.engine_sections import arguments_of
from gspo_megatron.models import load_recipe
from gspo_megatron.parallel import Layout
from gspo_megatron.plan import Plan, make_plan
from gspo_megatron.plan.estimate.attention_time import exchanged_bytes
from gspo_megatron.plan.estimate.calibration import CALIBRATED
from gspo_megatron.plan.estimate.engine_effects import MEGATRON_EFFECTS, VLLM_EFFECTS
from gspo_megatron.plan.estimate.memory import ALLOCATOR_SHARE

A3B = "recipes/qwen3_30b_a3b_gspo.yaml"
SECTION = {"trainer.megatron": MEGATRON_EFFECTS, "rollout.vllm": VLLM_EFFECTS}
KEYS = [(section, key) for section, effects in SECTION.items() for key in effects]
BESIDE = {
    "bucket_size": ["trainer.megatron.overlap_grad_reduce=true"],
    "recompute_modules": ["trainer.recompute=selective"],
    "hierarchical_context_parallel_sizes": [
        "trainer.context_parallel=8",
        "trainer.megatron={cp_comm_type: a2a+p2p, hierarchical_context_parallel_sizes: [2, 4]}",
    ],
    "moe_flex_dispatcher_backend": ["trainer.megatron.moe_token_dispatcher_type=flex"],
    "moe_flex_dispatcher_num_sms": ["trainer.megatron.moe_token_dispatcher_type=flex"],
    "moe_backend": ["placement.gpu=b200", "placement.gpus_per_node=4", "rollout.tensor_parallel=4"],
    "block_size": ["rollout.vllm.num_gpu_blocks_override=4000"],
    "max_num_batched_tokens": ["rollout.max_concurrency=512"],
}
"""What an argument acts with."""
VALUES = {
    "moe_backend": "triton", "kv_cache_dtype": "fp8", "recompute_modules": "[moe_act]", "cp_comm_type": "a2a",
    "hierarchical_context_parallel_sizes": "[4, 2]",
    "bucket_size": "400000000", "num_gpu_blocks_override": "4000", "max_num_batched_tokens": "65536",
    "optimization_level": "O0", "compilation_config": "{cudagraph_mode: NONE}", "cudagraph_capture_sizes": "[1, 2]",
    "max_cudagraph_capture_size": "2", "attention_config": "{flash_attn_version: 3}",
    "gradient_accumulation_fusion": "false",
    "kernel_config": "{enable_jit_warmup: false}", "moe_token_dispatcher_type": "flex",
}  # fmt: skip
"""Values of arguments with an effect, and of those that are neither a switch nor a choice."""


def plan_of(*overrides: str) -> Plan:
    return make_plan(load_recipe(Path(A3B), list(overrides)))


def figures(plan: Plan) -> tuple[Any, ...]:
    """Everything that the plan says of times and memory."""
    assert plan.compute and plan.rollout and plan.memory
    return plan.compute, plan.rollout, tuple(plan.memory)


def value_of(engine: str, key: str) -> str:
    """A value that is not the library's default."""
    if key in VALUES:
        return VALUES[key]
    form = arguments_of(engine)[key]
    choices = NARROWED.get(key, tuple(form.get("choices", ())))
    if choices:
        return str(next(choice for choice in reversed(choices) if choice != form["default"]))
    words = {"bool": str(not form["default"]).lower(), "int": "64", "float": "64.0", "text": "FLASHINFER"}
    return words.get(form["type"], "[0, 1]")


def test_every_argument_has_a_line() -> None:
    assert set(MEGATRON_EFFECTS) == set(MEGATRON_KEYS)
    assert set(VLLM_EFFECTS) == set(VLLM_KEYS)


@pytest.mark.parametrize(("section", "key"), KEYS, ids=lambda text: text.rpartition(".")[2])
def test_an_argument_changes_the_figures_or_is_named(section: str, key: str) -> None:
    beside = BESIDE.get(key, [])
    override = f"{section}.{key}={value_of(section.rpartition('.')[2], key)}"
    before, after = plan_of(*beside), plan_of(*beside, override)
    assert (figures(before) != figures(after)) == bool(SECTION[section][key])
    named = [finding for finding in after.findings if finding.code == "engine-not-counted" and finding.key == section]
    assert bool(named and key in named[0].message.split(" changes")[0]) != bool(SECTION[section][key])


def test_parts_without_an_effect_are_named_too() -> None:
    config = "rollout.vllm.compilation_config={cudagraph_mode: FULL, cudagraph_num_of_warmups: 2}"
    found = [f.message for f in plan_of(config, "rollout.vllm.optimization_level=O3").findings]
    assert "what compilation_config.cudagraph_num_of_warmups, optimization_level changes is not in the planned" in str(
        found
    )


def seconds(*overrides: str) -> dict[str, float]:
    plan = plan_of(*overrides)
    assert plan.compute
    return plan.compute.seconds


@pytest.mark.parametrize(
    "more", ["enforce_eager=true", "optimization_level=O0", "compilation_config={cudagraph_mode: 0}"]
)
def test_a_step_without_graphs_takes_the_launches_of_its_layers(more: str) -> None:
    """One response of 128 at a time: the host is slower than the GPU, and adds what a step takes beside the layers."""
    few = ["rollout.max_concurrency=1"]
    eager = CALIBRATED.eager_seconds * 48 + CALIBRATED.step_seconds + CALIBRATED.request_seconds
    plan = plan_of(*few, f"rollout.vllm.{more}").rollout
    assert plan and plan.tokens_per_second == pytest.approx(1 / eager)
    graphs = plan_of(*few).rollout
    assert graphs and graphs.tokens_per_second > 2 * plan.tokens_per_second


def test_only_batches_above_the_largest_graph_are_launched() -> None:
    """40 responses decode at a time on 8 GPUs; the longest go on alone, and their graph is there."""
    wide = ["rollout.tensor_parallel=8", "rollout.servers=4", "rollout.max_concurrency=40"]
    whole, half = (
        plan_of(*wide, *more).rollout for more in ([], ["rollout.vllm.cudagraph_capture_sizes=[1, 2, 4, 8, 16, 32]"])
    )
    assert whole and half and half.tokens_per_second < whole.tokens_per_second
    assert half.tail_seconds == whole.tail_seconds


def test_keys_of_one_byte_take_half_the_memory_and_half_the_reading() -> None:
    whole, half = plan_of().rollout, plan_of("rollout.vllm.kv_cache_dtype=fp8").rollout
    assert whole and half
    assert half.kv_bytes_per_token * 2 == whole.kv_bytes_per_token
    assert half.answers_at_limit == pytest.approx(2 * whole.answers_at_limit, abs=1)
    assert half.seconds < whole.seconds


def test_a_larger_step_takes_memory_and_reads_the_weights_less_often() -> None:
    plans = [plan_of(f"rollout.vllm.max_num_batched_tokens={count}").rollout for count in (512, 8192, 65536)]
    rooms = [plan.kv_room for plan in plans if plan]
    # States, heads and the rows of 8 experts of 384 columns: 2 bytes each.
    each = 2 * (4 * 2048 + (32 + 8) * 128 // 2 + 8 * (2048 + 384))
    assert rooms[0] - rooms[1] == 7680 * each and rooms[1] - rooms[2] == 57344 * each
    usual = plan_of().rollout
    assert usual and usual.kv_room == rooms[1]


def test_blocks_that_the_recipe_counts_hold_what_they_hold() -> None:
    plan = plan_of("rollout.vllm={num_gpu_blocks_override: 4097, block_size: 32}").rollout
    assert plan and plan.kv_room == 4096 * 32 * plan.kv_bytes_per_token_per_device
    assert plan.answers_at_limit == 4096 * 32 // 32768


def test_heads_are_exchanged_unhidden_and_a_ring_is_hidden() -> None:
    """At 30K tokens the scores take longer than their ring; the exchange of heads comes on top of them."""
    ring, heads = seconds(), seconds("trainer.megatron.cp_comm_type=a2a")
    assert heads["training"] > ring["training"] and heads["old log-probs"] > ring["old log-probs"]


def test_what_each_kind_receives_is_counted() -> None:
    """A rank of 8, one of 4 key heads for 32 of queries: bytes of a token and layer, by hand."""
    arch = load_recipe(Path(A3B)).arch
    kinds = {"p2p": (1, (0, 7 * 8)), "all_gather": (1, (0, 7 * 8)), "a2a+p2p": (4, (72 * 3 / 4, 8))}
    for kind, (inner, sizes) in kinds.items():
        layout = Layout(8, context=8, context_exchange=kind, inner_context=inner)
        assert exchanged_bytes(arch, layout, 2) == tuple(size * 128 * 2 for size in sizes)
    whole = Layout(4, context=4, context_exchange="a2a")
    assert exchanged_bytes(arch, whole, 2) == (72 * 3 / 4 * 128 * 2, 0)


def test_gathered_keys_are_not_hidden_and_take_the_memory_of_the_pack() -> None:
    overrides = [f"trainer.megatron.cp_comm_type={kind}" for kind in ("p2p", "all_gather")]
    assert seconds(overrides[1])["training"] > seconds(overrides[0])["training"]
    ring, gathered = (plan_of(one).memory for one in overrides)
    # Of a rank's tokens, two bytes each: 9 whole packs in place of 8 shares of 4 heads.
    assert ring and gathered
    more = gathered[0].peak_bytes - ring[0].peak_bytes
    assert more == pytest.approx((9 * 2 - 8) * 4 * 128 * 32768 / 2 * 2 * (1 + ALLOCATOR_SHARE), rel=1e-6)


def test_an_overlapped_reduction_leaves_its_last_bucket() -> None:
    """One bucket for all hides nothing; small ones hide it; very small ones cost a collective each."""
    plain = seconds()["training"]
    sizes = (10**10, 10**8, 10**4)
    found = [
        seconds("trainer.megatron.overlap_grad_reduce=true", f"trainer.megatron.bucket_size={size}")["training"]
        for size in sizes
    ]
    assert found[1] < found[0] < found[2]
    assert found[0] == pytest.approx(plain, rel=1e-4) and found[1] < plain


def test_padded_experts_are_read_and_multiplied_at_their_padded_width() -> None:
    """Experts of 192 columns are 256 wide on a B200: a step that reads all of them reads a third more."""
    base = ["placement.gpu=b200", "placement.gpus_per_node=4", "rollout.tensor_parallel=4", "rollout.servers=4"]
    padded, plain = (plan_of(*base, *more).rollout for more in ([], ["rollout.vllm.moe_backend=triton"]))
    assert padded and plain and padded.concurrency == plain.concurrency
    experts = 48 * 128 * 3 * 2048 * 64 * 2
    read = experts * (1 - (1 - 8 / 128) ** padded.concurrency) / (8e12 * CALIBRATED.server_share)
    slower = 1 / padded.tokens_per_second - 1 / plain.tokens_per_second
    assert slower * padded.concurrency == pytest.approx(read, rel=0.01)
    assert padded.seconds > plain.seconds
