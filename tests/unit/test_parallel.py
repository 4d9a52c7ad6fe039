"""Coordinates and the weight table, against megatron-core and by counting."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import count_parameters, hf_shapes, local_parameters
from gspo_megatron.models.pipeline_stages import stage_arguments
from gspo_megatron.models.qwen3.architecture import Qwen3Architecture
from gspo_megatron.parallel import Layout, layout_of, round_up

LAYOUTS = [
    Layout(8, tensor=2, pipeline=2, expert=2),
    Layout(8, tensor=2, context=2, expert=4),
    Layout(8, tensor=4, pipeline=2, expert=2, expert_tensor=2),
    Layout(16, tensor=2, pipeline=2, context=2, expert=8, virtual=2),
    Layout(8, pipeline=4),
    Layout(8, tensor=8, expert=2),  # more ranks than key-value heads: cuts inside a group
]
QWEN3_30B = Qwen3Architecture(
    vocab_size=151936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    max_position_embeddings=40960,
)
QWEN3_235B = QWEN3_30B.model_copy(
    update={"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "moe_intermediate_size": 1536}
)


def test_parameter_counts_of_the_published_models() -> None:
    assert count_parameters(QWEN3_30B) == pytest.approx(30.53e9, rel=1e-3)
    assert count_parameters(QWEN3_235B) == pytest.approx(235.09e9, rel=1e-3)


def test_coordinates_equal_megatrons_rank_generator() -> None:
    script = """
import sys, itertools
from megatron.core.parallel_state import RankGenerator
for tp, cp, dp, pp, ep, etp in eval(sys.stdin.read()):
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    world = tp * cp * dp * pp
    expert = RankGenerator(tp=etp, ep=ep, dp=world // (etp * ep * pp), pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    print([[dense.get_ranks(k) for k in ("tp", "cp", "dp", "pp")], [expert.get_ranks(k) for k in ("tp", "ep", "dp")]])
"""
    wanted = [(x.tensor, x.context, x.data, x.pipeline, x.expert, x.expert_tensor) for x in LAYOUTS]
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], input=repr(wanted), capture_output=True, text=True, check=True
    )
    dense_fields, expert_fields = ("tensor", "context", "data", "pipeline"), ("expert_tensor", "expert", "expert_data")
    for layout, line in zip(LAYOUTS, said.stdout.strip().splitlines()[-len(LAYOUTS) :], strict=True):
        dense, expert = eval(line)
        places = {rank: layout.coordinates(rank) for rank in range(layout.world)}
        for field, groups in itertools.chain(
            zip(dense_fields, dense, strict=True), zip(expert_fields, expert, strict=True)
        ):
            for group in groups:
                assert [getattr(places[rank], field) for rank in group] == list(range(len(group)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pieces_of_all_ranks_cover_every_tensor_equally_often(layout: Layout) -> None:
    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), ["model.architecture.num_key_value_heads=4"])
    arch = recipe.arch
    shapes = hf_shapes(arch)
    covered = {name: [0] * (shape[0] * (shape[1] if len(shape) > 1 else 1)) for name, shape in shapes.items()}
    for rank in range(layout.world):
        for chunk in range(layout.virtual):
            for parameter in local_parameters(arch, layout, layout.coordinates(rank), chunk):
                rows = [piece.at for piece in parameter.pieces]
                assert sorted(rows) == rows and rows[0][0] == 0 and rows[-1][1] == parameter.shape[0]
                for piece in parameter.pieces:
                    width = shapes[piece.tensor][1] if len(shapes[piece.tensor]) > 1 else 1
                    left, right = piece.columns or (0, 1)
                    for row in range(*piece.rows):
                        for column in range(left, right):
                            covered[piece.tensor][row * width + column] += 1
    assert all(len(set(counts)) == 1 and counts[0] >= 1 for counts in covered.values())


def test_uneven_stages_and_interleaved_layers() -> None:
    assert Layout(8, pipeline=8, first_stage_layers=11, last_stage_layers=11).stage_sizes(94) == [11, *[12] * 6, 11]
    layout = Layout(2, pipeline=2, virtual=2)
    assert [list(layout.layers(8, stage, chunk)) for chunk in (0, 1) for stage in (0, 1)] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    with pytest.raises(ValueError, match="94 layers over pipeline_parallel=8 leave 6; set first_stage_layers"):
        Layout(8, pipeline=8).stage_sizes(94)


def test_the_embedding_and_the_head_may_count_as_layers_of_their_chunks() -> None:
    """94 layers over 8 stages of 4 chunks: as Megatron divides 96 with both counted."""
    layout = Layout(8, pipeline=8, virtual=4, first_stage_layers=11, last_stage_layers=11)
    assert layout.chunk_sizes(94) == [[2, 3, 3, 3], *[[3] * 4] * 6, [3, 3, 3, 2]]
    held = [layer for chunk in range(4) for stage in range(8) for layer in layout.layers(94, stage, chunk)]
    assert held == list(range(94))


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Layout(8, pipeline=8, virtual=5, first_stage_layers=11, last_stage_layers=11), "12 with the embedding"),
        (Layout(2, pipeline=2, virtual=3, first_stage_layers=45, last_stage_layers=49), "nor does 50 with the head"),
        (Layout(32, pipeline=32, virtual=3, first_stage_layers=2, last_stage_layers=2), "3 with the embedding"),
        (Layout(8, pipeline=8, virtual=7, first_stage_layers=11, last_stage_layers=11), "a stage of 11"),
        (Layout(4, pipeline=4, virtual=2, first_stage_layers=22, last_stage_layers=22), "a stage of 25 layers does not "
         "divide by virtual_pipeline=2; choose a divisor"),
    ],
)  # fmt: skip
def test_chunks_that_cannot_be_equal_are_refused(layout: Layout, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        layout.chunk_sizes(94)


def test_padding_divides_over_context_and_tensor_ranks() -> None:
    """Zig-zag cuts a sequence into 2 CP chunks, and sequence parallelism each chunk into TP parts."""
    layouts = [Layout(1), Layout(2, tensor=2), Layout(2, context=2), Layout(8, tensor=2, context=4)]
    assert [layout.pad_multiple for layout in layouts] == [1, 2, 4, 16]
    assert [round_up(length, 8) for length in (0, 1, 8, 9)] == [0, 8, 8, 16]


def test_unequal_chunks_are_what_megatron_reads() -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    recipe = load_recipe(Path("recipes/qwen3_235b_a22b_gspo.yaml"), ["trainer.virtual_pipeline=4"])
    words = stage_arguments(recipe.arch, recipe.trainer)["pipeline_model_parallel_layout"]
    read = PipelineParallelLayerLayout.from_str(words, recipe.trainer.pipeline_parallel)
    read.validate_layer_layout(recipe.arch.num_hidden_layers, 0)
    counted = [[chunk.count(LayerType.decoder) for chunk in stage] for stage in read.layout]
    assert counted == layout_of(recipe.trainer, 128).chunk_sizes(recipe.arch.num_hidden_layers)
