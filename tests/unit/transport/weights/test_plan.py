"""The plan against an executor that knows none of it: real arrays moved by the plan, and Hugging Face tensors sliced
by vLLM's documented sharding."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models import architecture_of, weight_format
from gspo_megatron.models.hf_table import local_parameters
from gspo_megatron.models.qwen3.architecture import Qwen3Architecture
from gspo_megatron.models.vllm_layout import ServerLayout, needed_values, server_parameters
from gspo_megatron.models.weight_format import SCALE, WeightFormat, is_quantised
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.weights.flows import fair_shares
from gspo_megatron.transport.weights.plan import Slice, TransferPlan

PLAIN, FP8 = WeightFormat("float64"), WeightFormat("float64", fp8=True)


def architecture(**changes) -> Architecture:
    shape = {
        "vocab_size": 152,  # 192 with vLLM's padding
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }
    return Qwen3Architecture.model_validate({**shape, **changes})


def dense(**changes) -> Architecture:
    return architecture(model_type="qwen3", num_experts=0, num_experts_per_tok=0, **changes)


def biased(**changes) -> Architecture:
    """A Qwen2.5, with a bias of queries, keys and values."""
    values = {**dense(hidden_size=32, **changes).model_dump(exclude={"norm_topk_prob"}), "model_type": "qwen2"}
    return architecture_of({**values, "moe_intermediate_size": 0})


def hugging_face(arch: Architecture, form: WeightFormat) -> dict[str, np.ndarray]:
    """Every value of the model, and every scale, once, so that a value says where it is from."""
    start, tensors = 1.0, {}
    for name, shape in form.shapes(arch).items():
        size = int(np.prod(shape))
        tensors[name] = np.arange(start, start + size).reshape(shape)
        start += size
    return tensors


def trainer_shards(
    arch: Architecture, trainer: Layout, tensors: dict[str, np.ndarray], form: WeightFormat
) -> list[dict[str, np.ndarray]]:
    """What every trainer rank holds, by the table that fills Megatron's parameters."""
    shards: list[dict[str, np.ndarray]] = []
    for rank in range(trainer.world):
        held: dict[str, np.ndarray] = {}
        for chunk in range(trainer.virtual):
            for entry in form.held(local_parameters(arch, trainer, trainer.coordinates(rank), chunk)):
                held[entry.name] = np.full(entry.shape, np.nan)
                for piece in entry.pieces:
                    part = tensors[piece.tensor][slice(*piece.rows)]
                    held[entry.name][slice(*piece.at)] = (
                        part if piece.columns is None else part[:, slice(*piece.columns)]
                    )
        shards.append(held)
    return shards


def cut(array: np.ndarray, axis: int, index: int, count: int) -> np.ndarray:
    return np.split(array, count, axis)[index]


def server_model(
    arch: Architecture, layout: ServerLayout, tensors: dict[str, np.ndarray], data: int, stage: int, tensor: int
) -> dict[str, np.ndarray]:
    """One worker's parameters as vLLM documents them: column- and row-parallel layers, fused projections, experts."""
    tp, model = layout.tensor, {}
    first, last = stage == 0, stage == layout.pipeline - 1

    def padded(name: str) -> np.ndarray:
        rows = -arch.vocab_size % 64
        return cut(np.pad(tensors[name], ((0, rows), (0, 0)), constant_values=np.nan), 0, tensor, tp)

    if first or (last and arch.tie_word_embeddings):
        model["model.embed_tokens.weight"] = padded("model.embed_tokens.weight")
    if last:
        model["model.norm.weight"] = tensors["model.norm.weight"]
        if not arch.tie_word_embeddings:
            model["lm_head.weight"] = padded("lm_head.weight")
    # vLLM 0.32 get_pp_indices: a remainder goes to the stages before the last, from the back.
    sizes = [arch.num_hidden_layers // layout.pipeline] * layout.pipeline
    for back in range(2, arch.num_hidden_layers % layout.pipeline + 2):
        sizes[-back] += 1
    for layer in range(sum(sizes[:stage]), sum(sizes[: stage + 1])):
        prefix = f"model.layers.{layer}."
        norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        for name in (f"{prefix}{norm}.weight" for norm in norms):
            if name in tensors:
                model[name] = tensors[name]
        key_ranks = min(tp, arch.num_key_value_heads)
        key = tensor * key_ranks // tp
        for kind in ("weight", "bias"):
            names = [f"{prefix}self_attn.{part}_proj.{kind}" for part in "qkv"]
            if names[0] not in tensors:
                continue
            q, k, v = (tensors[name] for name in names)
            model[f"{prefix}self_attn.qkv_proj.{kind}"] = np.concatenate(
                [cut(q, 0, tensor, tp), cut(k, 0, key, key_ranks), cut(v, 0, key, key_ranks)]
            )
        model[f"{prefix}self_attn.o_proj.weight"] = cut(tensors[f"{prefix}self_attn.o_proj.weight"], 1, tensor, tp)
        mlp = f"{prefix}mlp."
        if not arch.num_experts:
            gate, up, down = (tensors[f"{mlp}{part}_proj.weight"] for part in ("gate", "up", "down"))
            model[f"{mlp}gate_up_proj.weight"] = np.concatenate([cut(gate, 0, tensor, tp), cut(up, 0, tensor, tp)])
            model[f"{mlp}down_proj.weight"] = cut(down, 1, tensor, tp)
            continue
        model[f"{mlp}gate.weight"] = tensors[f"{mlp}gate.weight"]
        gate, up, down = (
            np.stack([tensors[f"{mlp}experts.{e}.{part}_proj.weight"] for e in range(arch.num_experts)])
            for part in ("gate", "up", "down")
        )
        ranks, index = tp * layout.data, data * tp + tensor
        if layout.expert_parallel:
            gate, up, down = (np.array_split(part, ranks)[index] for part in (gate, up, down))
        else:
            gate, up, down = cut(gate, 1, index, ranks), cut(up, 1, index, ranks), cut(down, 2, index, ranks)
        if layout.expert_width:
            more = layout.expert_width - gate.shape[1]
            gate, up = (np.pad(part, ((0, 0), (0, more), (0, 0)), constant_values=np.nan) for part in (gate, up))
            down = np.pad(down, ((0, 0), (0, 0), (0, more)), constant_values=np.nan)
        model[f"{mlp}experts.routed_experts.w13_weight"] = np.concatenate([gate, up], 1)
        model[f"{mlp}experts.routed_experts.w2_weight"] = down
    return model


def rectangle(array: np.ndarray, part: Slice) -> np.ndarray:
    """The view of a parameter that a slice names."""
    array = array.reshape((1,) * (3 - array.ndim) + array.shape) if array.ndim > 1 else array[None, :, None]
    expert, row, column = part.at
    return array[expert, row : row + part.height, column : column + part.width]


def execute(plan: TransferPlan, shards: list[dict[str, np.ndarray]], server_rank) -> list[dict[str, np.ndarray]]:
    """Move values as the plan says, message by message; NaN where nothing arrived."""
    wires = {
        (rank, message.peer, message.round): np.concatenate(
            [rectangle(shards[rank][part.parameter], part).ravel() for part in message.slices]
        )
        for rank in range(plan.trainer.world)
        for message in plan.to_send(rank)
    }
    workers = []
    for worker in range(plan.workers):
        layout, rank = server_rank(worker)
        parameters = plan.form.wanted(server_parameters(plan.arch, layout, rank))
        held = {p.name: np.full(p.shape, np.nan) for p in parameters}
        for message in plan.to_receive(worker):
            wire = wires.pop((message.peer, worker, message.round))
            for part in message.slices:
                target = rectangle(held[part.parameter], part)
                assert np.isnan(target).all(), f"{part} is sent twice"
                target[...] = wire[: part.size].reshape(target.shape)
                wire = wire[part.size :]
            assert not len(wire)
        workers.append(held)
    assert not wires, "messages that nobody receives"
    return workers


def server_scales(
    arch: Architecture, layout: ServerLayout, tensors: dict[str, np.ndarray], *place: int
) -> dict[str, np.ndarray]:
    """One worker's scales: each value of a matrix gives way to the scale of its block, then vLLM cuts the matrix."""
    block, spread = weight_format.BLOCK, dict(tensors)
    for name in filter(is_quantised, tensors):
        height, width = tensors[name].shape
        spread[name] = np.kron(tensors[name + SCALE], np.ones((block, block)))[:height, :width]
    model = server_model(arch, layout, spread, *place)
    quantised = [name for name in model if name.endswith("_proj.weight") or "routed_experts" in name]
    return {name + SCALE: model[name][..., ::block, ::block] for name in quantised}


def cuts_blocks(arch: Architecture, layout: ServerLayout) -> bool:
    """Whether a rank of a server, or a part of a fused parameter, begins within a block."""
    block, tensor = weight_format.BLOCK, layout.tensor
    key = max(arch.num_key_value_heads // tensor, 1) * arch.head_dim
    query = arch.num_attention_heads // tensor * arch.head_dim
    if arch.num_experts:
        ranks = 1 if layout.expert_parallel else tensor * layout.data
        inner = arch.moe_intermediate_size // ranks
        edges = [layout.expert_width or inner, *([inner] if ranks > 1 else [])]
    else:
        edges = [arch.intermediate_size // tensor]
    return any(edge % block for edge in (query, query + key, *([key] if tensor > 1 else []), *edges))


def check(
    arch: Architecture, trainer: Layout, servers: list[ServerLayout], bucket_bytes: int, form: WeightFormat = PLAIN
) -> TransferPlan:
    plan = TransferPlan(arch, trainer, servers, form, bucket_bytes)
    tensors = hugging_face(arch, form)
    owners = [(layout, rank) for layout in servers for rank in range(layout.world)]
    found = execute(plan, trainer_shards(arch, trainer, tensors, form), lambda worker: owners[worker])
    received = plan.received_bytes()
    for worker, (layout, rank) in enumerate(owners):
        rest, tensor = divmod(rank, layout.tensor)
        place = (*divmod(rest, layout.pipeline), tensor)
        expected = server_model(arch, layout, tensors, *place)
        values = sum(int(np.isfinite(value).sum()) for value in expected.values())
        if form.fp8:
            expected |= server_scales(arch, layout, tensors, *place)
        assert found[worker].keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[worker][name], value, err_msg=f"{name} on worker {worker}")
        needed = [np.isfinite(value).sum() * form.item_bytes(name) for name, value in expected.items()]
        assert received[worker] == sum(needed)
        assert values == needed_values(arch, layout, rank)
    assert plan.sent_bytes().sum() == received.sum()
    return plan


@st.composite
def trainers(draw, arch: Architecture) -> Layout:
    """A layout that the model divides by, with one to two replicas."""
    tensor, context = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    expert = (
        draw(st.sampled_from([size for size in (1, 2, 4) if arch.num_experts % size == 0])) if arch.num_experts else 1
    )
    expert_tensor = draw(st.sampled_from([1, 2])) if arch.num_experts else 1
    stage = int(np.lcm(tensor * context, expert * expert_tensor)) * draw(st.sampled_from([1, 2]))
    pipeline, virtual, ends = draw(
        st.sampled_from([(1, 1, None), (2, 1, (1, arch.num_hidden_layers - 1)), (2, 2, None)])
    )
    if virtual == 2 and arch.num_hidden_layers % 4:
        virtual, ends = 1, (2, 3)
    first, last = ends or (None, None)
    return Layout(stage * pipeline, tensor, pipeline, virtual, context, expert, expert_tensor, first, last)


@st.composite
def server_layouts(draw, arch: Architecture) -> list[ServerLayout]:
    def one() -> ServerLayout:
        layout = ServerLayout(
            draw(st.sampled_from([1, 2, 4])),
            draw(st.sampled_from([1, 2, 3])),
            draw(st.sampled_from([1, 2])) if arch.num_experts else 1,
            bool(arch.num_experts) and draw(st.booleans()),
        )
        if not arch.num_experts or draw(st.booleans()):
            return layout
        width = arch.moe_intermediate_size // (1 if layout.expert_parallel else layout.tensor * layout.data)
        return replace(layout, expert_width=width + draw(st.integers(1, 5)))

    return [one() for _ in range(draw(st.integers(1, 3)))]


MODELS = [
    architecture(),
    architecture(num_experts=6, tie_word_embeddings=True),
    dense(num_hidden_layers=5),
    dense(tie_word_embeddings=True),
    biased(),
    biased(tie_word_embeddings=True, num_hidden_layers=5),
]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(MODELS), st.sampled_from([64, 1000, 1 << 20]))
def test_every_value_arrives_once_at_its_place(data, arch: Architecture, bucket_bytes: int) -> None:
    check(arch, data.draw(trainers(arch)), data.draw(server_layouts(arch)), bucket_bytes)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(MODELS), st.sampled_from([64, 1000, 1 << 20]), st.sampled_from([2, 4, 8]))
def test_bytes_and_scales_of_blocks_arrive_once_at_their_place_or_are_refused(
    data, arch: Architecture, bucket_bytes: int, block: int
) -> None:
    trainer, servers = data.draw(trainers(arch)), data.draw(server_layouts(arch))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_format, "BLOCK", block)
        if any(cuts_blocks(arch, layout) for layout in servers):
            with pytest.raises(ValueError, match=f"a block of fp8 is {block} x {block}; choose a server layout"):
                TransferPlan(arch, trainer, servers, FP8, bucket_bytes)
        else:
            check(arch, trainer, servers, bucket_bytes, FP8)


def test_a_receiver_gets_no_more_a_round_than_asked() -> None:
    plan = check(architecture(), Layout(8, 2, 2, expert=4), [ServerLayout(2), ServerLayout(1)], 2000)
    for worker in range(plan.workers):
        sizes: dict[int, int] = {}
        for message in plan.to_receive(worker):
            sizes[message.round] = sizes.get(message.round, 0) + message.num_bytes
        assert max(sizes.values()) <= 2000 and len(sizes) > 10


def test_shares_fill_the_emptiest_first() -> None:
    np.testing.assert_allclose(fair_shares(np.array([5.0, 1.0, 2.0]), 3.0), [0, 2, 1])
    np.testing.assert_allclose(fair_shares(np.array([5.0, 1.0, 2.0]), 10.0), [1, 5, 4])
    np.testing.assert_allclose(fair_shares(np.array([7.0]), 10.0), [10])


QWEN3_235B = architecture(
    vocab_size=151936, hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4,
    head_dim=128, intermediate_size=12288, moe_intermediate_size=1536, num_experts=128, num_experts_per_tok=8,
)  # fmt: skip
QWEN3_30B = architecture(
    vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
    head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
)  # fmt: skip
ENDS: dict[str, Any] = {"first_stage_layers": 11, "last_stage_layers": 11}


@pytest.mark.parametrize(
    ("arch", "trainer", "server"),
    [
        (QWEN3_30B, Layout(8, expert=8), ServerLayout(2)),
        (QWEN3_30B, Layout(16, tensor=2, expert=8, expert_tensor=2), ServerLayout(4, expert_parallel=True)),
        (QWEN3_235B, Layout(64, 4, 8, context=2, expert=8, **ENDS), ServerLayout(4)),
        (QWEN3_235B, Layout(64, 4, 8, context=2, expert=8, **ENDS), ServerLayout(8, expert_parallel=True)),
    ],
)
def test_fp8_is_about_half_of_bfloat16_on_the_wire(arch: Architecture, trainer: Layout, server: ServerLayout) -> None:
    forms = (WeightFormat("bfloat16"), WeightFormat("bfloat16", fp8=True))
    plain, fp8 = (TransferPlan(arch, trainer, [server], form, 64 << 20).received_bytes() for form in forms)
    assert 0.5 < fp8.sum() / plain.sum() < 0.52 and (fp8 / plain).max() < 0.52


@pytest.mark.parametrize(
    "trainer", [Layout(256, 4, 8, context=8, expert=32, **ENDS), Layout(128, 2, 8, context=8, expert=16, **ENDS)]
)
@pytest.mark.parametrize(
    "servers", [[ServerLayout(8)] * 8, [ServerLayout(16)] * 4, [ServerLayout(4, data=4, expert_parallel=True)] * 4]
)
@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "fp8"])
def test_the_plan_of_a_large_model_is_even_and_quick(trainer: Layout, servers: list[ServerLayout], fp8: bool) -> None:
    form = WeightFormat("bfloat16", fp8)
    if fp8 and not servers[0].expert_parallel:
        with pytest.raises(ValueError, match="a block of fp8 is 128 x 128"):  # 192 columns of an expert, and 96
            TransferPlan(QWEN3_235B, trainer, servers, form, 64 << 20)
        return
    started = time.process_time()
    plan = TransferPlan(QWEN3_235B, trainer, servers, form, 64 << 20)
    sent, received = plan.sent_bytes(), plan.received_bytes()
    assert time.process_time() - started < 2 + fp8
    assert sent.max() / sent.mean() < 1.1 and received.max() / received.mean() < 1.1
