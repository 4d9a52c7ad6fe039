"""The planner's numbers against closed forms and against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import local_parameters
from gspo_megatron.models.weight_format import WeightFormat
from gspo_megatron.parallel import Layout
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.as_text import lines
from gspo_megatron.plan.estimate import flops
from gspo_megatron.plan.estimate.activations import Shape, head_bytes, layers_in_flight
from gspo_megatron.plan.estimate.attention_time import Slot
from gspo_megatron.plan.estimate.batch import plan_batch
from gspo_megatron.plan.estimate.layer_time import layer_time
from gspo_megatron.plan.estimate.memory import Held, exact_bytes, held_by
from gspo_megatron.plan.estimate.practice import Practice
from gspo_megatron.plan.estimate.rollout import weight_bytes
from gspo_megatron.plan.rules.layout import layout_of
from gspo_megatron.plan.rules.resources import host_bytes, pinned_bytes

A3B, A22B = Path("recipes/qwen3_30b_a3b_gspo.yaml"), Path("recipes/qwen3_235b_a22b_gspo_100k.yaml")

FIRST_ORDER = (
    "trainer.tensor_parallel=2", "trainer.context_parallel=8", "trainer.expert_parallel=16", "trainer.recompute=full"
)  # fmt: skip
"""The layout of the first-order numbers for 235B at 100K."""


def architecture(path: Path) -> Architecture:
    found = load_recipe(path).arch
    assert found is not None
    return found


def parameters_by_hand(arch: Architecture) -> tuple[int, int]:
    """Total and active, written out layer by layer."""
    hidden, head = arch.hidden_size, arch.head_dim
    queries, keys = arch.num_attention_heads * head, arch.num_key_value_heads * head
    attention = hidden * queries * 2 + hidden * keys * 2 + 2 * head
    expert = 3 * hidden * arch.moe_intermediate_size
    rest = attention + arch.num_experts * hidden + 2 * hidden
    ends = 2 * arch.vocab_size * hidden + hidden
    total = arch.num_hidden_layers * (rest + arch.num_experts * expert) + ends
    return total, arch.num_hidden_layers * (rest + arch.num_experts_per_tok * expert) + ends


@pytest.mark.parametrize(
    ("path", "total", "active"), [(A3B, 30.53e9, 3.35e9), (A22B, 235.09e9, 22.2e9)], ids=["30B-A3B", "235B-A22B"]
)
def test_parameters_are_the_published_ones(path: Path, total: float, active: float) -> None:
    arch = architecture(path)
    assert (flops.parameters(arch), flops.active_parameters(arch)) == parameters_by_hand(arch)
    assert flops.parameters(arch) == pytest.approx(total, rel=1e-3)
    assert flops.active_parameters(arch) == pytest.approx(active, rel=2e-3)


@pytest.mark.parametrize(
    ("path", "linear", "quadratic", "at_100k", "share"),
    [(A3B, 6.08e9, 393_216, 46.3e9, 0.87), (A22B, 43.14e9, 1_540_096, 200.8e9, 0.79)],
    ids=["30B-A3B", "235B-A22B"],
)
def test_operations_are_the_closed_forms(
    path: Path, linear: float, quadratic: int, at_100k: float, share: float
) -> None:
    arch = architecture(path)
    assert flops.linear_flops(arch) == pytest.approx(linear, rel=1e-3)
    assert flops.quadratic_flops(arch) == quadratic
    assert flops.forward_flops(arch, 102_400) == pytest.approx(at_100k, rel=2e-3)
    assert flops.attention_share(arch, 102_400) == pytest.approx(share, abs=5e-3)


def test_bytes_of_a_token_are_the_closed_forms() -> None:
    assert (flops.kv_bytes(architecture(A3B)), flops.route_bytes(architecture(A3B))) == (98_304, 384)
    assert (flops.kv_bytes(architecture(A22B)), flops.route_bytes(architecture(A22B))) == (192_512, 752)


def test_shards_of_all_ranks_add_up_to_the_model() -> None:
    """Each parameter is on exactly as many ranks as the layout says it is replicated."""
    arch = architecture(Path("recipes/tiny_moe.yaml"))
    layout = Layout(world=8, tensor=2, pipeline=2, context=2, expert=2)
    dense = expert = 0
    for rank in range(8):
        held = Held.of(local_parameters(arch, layout, layout.coordinates(rank)))
        dense, expert = dense + sum(held.dense), expert + sum(held.expert)
    experts = arch.num_hidden_layers * arch.num_experts * flops.expert_parameters(arch)
    assert expert == experts * layout.expert_data
    assert dense >= (flops.parameters(arch) - experts) * layout.data * layout.context


def test_the_cache_of_held_parameters_changes_nothing() -> None:
    arch = architecture(A22B)
    layout = layout_of(load_recipe(A22B).trainer, 128)
    for stage in range(8):
        at = layout.coordinates(stage * 16)
        assert held_by(arch, layout, stage) == (Held.of(local_parameters(arch, layout, at)),)
        (plain,), (valued,) = held_by(arch, layout, stage), held_by(arch, layout, stage, critic=True)
        assert valued.dense == plain.dense + ((arch.hidden_size,) if stage == 7 else ())


def test_bytes_with_the_distributed_optimizer_by_hand() -> None:
    """Two tensors of 100 and 30 elements, 4 replicas: 30 starts at 0, 100 at 64, the end goes to lcm(4, 128) = 256."""
    layout = Layout(world=4)
    found = exact_bytes([Held((100, 30), ())], layout, element=2, distributed=True, on_cpu=False)
    assert found == {"weights": 512, "gradients": 1024, "optimizer": 64 * 12}
    plain = exact_bytes([Held((100, 30), ())], layout, element=2, distributed=False, on_cpu=True)
    assert plain == {"weights": 260, "gradients": 520, "optimizer": 130 * 12 + 2 * 4}


def test_layers_in_flight_by_hand() -> None:
    recipe = load_recipe(A3B, ["trainer.pipeline_parallel=4", "trainer.expert_parallel=2"])
    plain = layout_of(recipe.trainer, 32)
    cut = plan_batch(recipe, plain)
    assert [layers_in_flight(plain, cut, stage, 12) for stage in range(4)] == [48, 36, 24, 12]
    mixed = Layout(world=32, pipeline=4, virtual=2, context=4, expert=2)
    # Stage 0 warms up 3*2 + 1*4 chunks and runs one more, of 6 layers each.
    assert [layers_in_flight(mixed, cut, stage, 12) for stage in range(4)] == [66, 54, 42, 30]


def test_the_head_never_holds_the_logits() -> None:
    """151,936 columns and 131,072 tokens would be 79.7 GB of float32 logits."""
    recipe = load_recipe(A3B, ["trainer.micro_batch_tokens=131072", "trainer.context_parallel=1"])
    shape = Shape.of(recipe, architecture(A3B), Layout(world=32))
    states = 2 * 131_072 * 2048 * 2
    assert head_bytes(shape, 1024) - states == 3 * 1024 * 151_936 * 4 + 151_936 * 2048 * 6


def test_attention_above_the_key_value_heads_keeps_the_product_of_all_ranks() -> None:
    """64 query and 4 key-value heads of 128 over 8 ranks: 72 heads are gathered, 8 + 1 rotated, 8 come out."""
    recipe = load_recipe(A22B, ["trainer.micro_batch_tokens=131072", "trainer.context_parallel=1"])
    eight, four = (Shape.of(recipe, architecture(A22B), Layout(world=128, tensor=tensor)) for tensor in (8, 4))
    token = 131_072 * 128 * 2
    assert (eight.projection_bytes, four.projection_bytes) == (72 * token, 72 * token // 4)
    normalisers, states = 131_072 * 8 * 4, 2 * 131_072 * 4096 * 2 // 8
    assert eight.attention_bytes == (72 + 8 + 1 + 8) * token + normalisers + states
    assert four.attention_bytes == (18 + 16 + 1 + 16) * token + 2 * normalisers + 2 * states


def test_offloaded_layer_inputs_leave_the_device_for_the_host() -> None:
    overrides = [*FIRST_ORDER, "placement.rollout_nodes=4", "placement.nodes=20"]
    kept, moved = (
        make_plan(load_recipe(A22B, [*overrides, f"trainer.offload_activations={on}"])) for on in ("false", "true")
    )
    assert kept.memory is not None and moved.memory is not None and moved.batch is not None
    shape = Shape.of(moved.recipe, architecture(A22B), layout_of(moved.recipe.trainer, 128))
    first = moved.memory[0]
    in_flight = 8 * first.layers
    assert shape.input_bytes == 13_056 * 4096 // 2 * 2, "104,448 tokens over CP 8, TP 2"
    assert kept.memory[0].estimated["saved activations"] == in_flight * shape.input_bytes
    assert "saved activations" not in first.estimated and first.offloaded == in_flight * 2**26
    assert first.peak_bytes < kept.memory[0].peak_bytes - kept.memory[0].estimated["saved activations"]
    host = host_bytes(moved.recipe, architecture(A22B), moved.machine, moved.batch, moved.memory)
    assert host["offloaded activations"] == 8 * first.offloaded
    assert moved.compute is not None and kept.compute is not None
    assert moved.compute.seconds["training"] > kept.compute.seconds["training"]


def test_small_blocks_of_pinned_memory_come_in_powers_of_two_and_large_ones_as_they_are() -> None:
    sizes = (0, 1, 3, 1024, 1025, 200 << 20, 5 << 30)
    assert [pinned_bytes(size) for size in sizes] == [0, 1, 4, 1024, 2048, 256 << 20, 5 << 30]
    plan = make_plan(load_recipe(A3B))
    assert plan.memory is not None and plan.batch is not None
    exact = plan.memory[0].exact
    host = host_bytes(plan.recipe, plan.recipe.arch, plan.machine, plan.batch, plan.memory)
    assert host["copy for checkpoints"] == 8 * pinned_bytes(exact["dense optimizer"] + exact["expert optimizer"])
    blocks = [pinned_bytes(exact[f"dense {kind}"] + exact[f"expert {kind}"]) for kind in ("weights", "optimizer")]
    assert host["offloaded trainer states"] == 8 * sum(blocks)


def test_server_weights_by_hand() -> None:
    """TP 8 with 4 key-value heads: k and v are held twice; norms and routers everywhere."""
    arch = architecture(A22B)
    layer = 4096 * 64 * 128 * 2 // 8 + 2 * 4096 * 512 // 4 + 128 * 3 * 4096 * 1536 // 8
    copied = 128 * 4096 + 2 * 4096 + 2 * 128
    heads = 2 * 151_936 * 4096 // 8
    assert weight_bytes(arch, 8, 1, WeightFormat("bfloat16")) == 2 * (94 * (layer + copied) + heads + 4096)


@pytest.mark.parametrize(
    ("overrides", "first", "last"),
    [
        (
            "placement.nodes=8 rollout.servers=8 trainer.pipeline_parallel=4 "
            "trainer.first_stage_layers=23 trainer.last_stage_layers=23",
            87,
            78,
        ),
        ("placement.nodes=16", 51, 42),
        ("placement.nodes=32 rollout.servers=32 trainer.tensor_parallel=4 trainer.expert_parallel=32", 28, 23),
    ],
    ids=["64 GPUs", "128 GPUs", "256 GPUs"],
)
def test_235b_at_100k_is_near_the_first_order_numbers(overrides: str, first: int, last: int) -> None:
    """First-order numbers in GB without a sleeping server: independent arithmetic, not tuned to."""
    plan = make_plan(load_recipe(A22B, [*FIRST_ORDER, *overrides.split()]))
    assert plan.memory is not None
    ends = [stage.peak_bytes - stage.estimated["sleeping server"] for stage in (plan.memory[0], plan.memory[-1])]
    assert ends[0] / 1e9 == pytest.approx(first, rel=0.08)
    assert ends[1] / 1e9 == pytest.approx(last, rel=0.20)


def test_batch_algebra_in_words() -> None:
    plan = make_plan(load_recipe(A3B, ["trainer.context_parallel=4"]))
    assert plan.batch is not None
    text = "\n".join(plan.batch.words())
    for words in (
        "128 prompts x 16 responses = 2048 sequences",
        "32 whole groups = 512 sequences",
        "64 sequences each",
    ):
        assert words in text


def test_check_takes_the_ranks_of_this_machine() -> None:
    from gspo_megatron.plan import check

    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), ["trainer.tensor_parallel=2"])
    assert check(recipe, ranks=2) == []
    assert [finding.code for finding in check(recipe, ranks=3)] == ["world-not-divisible"]


def test_price_and_energy_are_those_of_the_gpu_hours() -> None:
    plain, asked = (
        make_plan(load_recipe(A3B, words)) for words in ([], ["placement.price=2.5", "placement.power=1000"])
    )
    assert plain.compute is not None and asked.compute is not None
    assert (plain.compute.price, plain.compute.kilowatt_hours) == (None, None)
    assert asked.compute.price == pytest.approx(2.5 * plain.compute.device_hours)
    assert asked.compute.kilowatt_hours == pytest.approx(plain.compute.device_hours)
    assert any("2.5 a GPU-hour" in line and "kWh" in line for line in lines(asked))
    assert not any("kWh" in line for line in lines(plain))


MAPS = (
    ("trainer.megatron.moe_token_dispatcher_type=flex", -1),
    ("trainer.megatron.overlap_grad_reduce=true", -1),
    ("trainer.megatron.gradient_accumulation_fusion=false", 1),
)


@pytest.mark.parametrize(("setting", "sign"), MAPS)
def test_engine_settings_are_planned(setting: str, sign: int) -> None:
    seconds = []
    for words in ([], [setting]):
        work = make_plan(load_recipe(A3B, ["trainer.expert_parallel=16", *words])).compute
        assert work is not None
        seconds.append(work.seconds["training"])
    assert (seconds[1] - seconds[0]) * sign > 0


def test_what_selective_recomputation_repeats_is_planned() -> None:
    """Less is repeated, more is kept: norms and activation, then the experts, then everything."""
    light = "trainer.megatron.recompute_modules=[layernorm,moe_act]"
    found = []
    for words in (["none"], ["selective", light], ["selective"], ["full"]):
        change = [f"trainer.recompute={words[0]}", *words[1:], "placement.gpu=h200"]
        plan = make_plan(load_recipe(A3B, change))
        assert plan.compute is not None and plan.memory is not None
        found.append((plan.compute.seconds["training"], plan.memory[0].peak_bytes))
    assert found == sorted(found, key=lambda one: one[0]) and len({seconds for seconds, _ in found}) == 4
    assert [size for _, size in found] == sorted((size for _, size in found), reverse=True)


def test_a_node_gets_one_copy_of_a_token_however_uneven_the_experts_are() -> None:
    """Four nodes: nine of ten tokens have an expert on each other one, so imbalance cannot add more than the tenth."""
    plan = make_plan(load_recipe(A3B, ["trainer.expert_parallel=32"]))
    assert plan.layout is not None
    even, uneven = (
        layer_time(
            plan.recipe.arch, plan.layout, plan.machine, Slot(4096, 4096), Practice(dispatch="fused", balanced=balanced)
        ).mixer.exchange
        for balanced in (True, False)
    )
    assert even < uneven < 1.12 * even
