"""What each family says of its models, against transformers, megatron-core and vLLM's rules."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.config import RecipeError
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.refusal import quote
from gspo_megatron.models import architecture_of, load_recipe, load_resolved
from gspo_megatron.models.hf_table import count_parameters, hf_shapes, local_parameters
from gspo_megatron.models.registry import BY_TYPE, FAMILIES, family_of
from gspo_megatron.models.rope import read_rope
from gspo_megatron.models.vllm_layout import ServerLayout, server_parameters
from gspo_megatron.parallel import Layout
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.estimate import flops
from tests.parallel.hf_model import stack_experts
from tests.places import ROOT

TINY = ROOT / "recipes" / "tiny_moe.yaml"
SHAPE = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DENSE = {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 32, **EXPERTS},
    "llama": {"model_type": "llama", "head_dim": 16},
    "llama, wide heads, tied": {"model_type": "llama", "head_dim": 32, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "head_dim": 16},
    "qwen2, tied": {"model_type": "qwen2", "head_dim": 16, "tie_word_embeddings": True},
}


def architecture(name: str, **changes: Any) -> Architecture:
    return architecture_of(SHAPE | MODELS[name] | changes)


def with_sections(values: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return values | {name: values[name] | section for name, section in sections.items()}


def write_config(directory: Path, **values: Any) -> list[str]:
    (directory / "config.json").write_text(json.dumps(values))
    return [f"model.path={directory}", "model.architecture=null"]


def refusals(*overrides: str) -> list[tuple[str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(TINY, overrides)
    return [(finding.key, finding.message, finding.fix) for finding in caught.value.findings]


def test_every_model_type_is_tested() -> None:
    assert {values["model_type"] for values in MODELS.values()} == set(BY_TYPE)


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_count_are_those_of_transformers(name: str) -> None:
    arch = architecture(name)
    config = AutoConfig.for_model(**arch.to_hugging_face("float32"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        ours = stack_experts(arch, {name: torch.empty(shape) for name, shape in hf_shapes(arch).items()})
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == theirs
    assert count_parameters(arch) == sum(map(math.prod, theirs.values()))


def test_parameter_counts_of_the_published_models() -> None:
    """Qwen2.5-7B and Llama-3.1-8B, as their model cards count them."""
    qwen = architecture(
        "qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, head_dim=128,
    )  # fmt: skip
    llama = architecture(
        "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    assert (count_parameters(qwen), count_parameters(llama)) == (7_615_616_512, 8_030_261_248)


@pytest.mark.parametrize("name", MODELS)
def test_a_published_directory_reads_back_as_the_same_architecture(tmp_path: Path, name: str) -> None:
    arch = architecture(name)
    AutoConfig.for_model(**arch.to_hugging_face("float32")).save_pretrained(tmp_path)
    found = load_recipe(TINY, [f"model.path={tmp_path}", "model.architecture=null"])
    assert found.arch == arch
    assert found.model.architecture == arch.model_dump(mode="json")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_servers_hold_every_value_of_the_model(name: str, tensor: int) -> None:
    """Each value at least once over the ranks; a vector of a fused projection is cut like the rows of its weight."""
    arch, layout = architecture(name), ServerLayout(tensor)
    seen = {name: torch.zeros(shape) for name, shape in hf_shapes(arch).items()}
    for rank in range(layout.world):
        held = {parameter.name: parameter for parameter in server_parameters(arch, layout, rank)}
        for parameter in held.values():
            for piece in parameter.pieces:
                part = seen[piece.tensor][slice(*piece.rows)]
                (part if piece.columns is None else part[:, slice(*piece.columns)]).add_(1)
        for bias in (parameter for parameter in held.values() if parameter.name.endswith("bias")):
            weight = held[bias.name.replace("bias", "weight")]
            assert bias.shape == weight.shape[:1]
            assert [(piece.rows, piece.at) for piece in bias.pieces] == [(p.rows, p.at) for p in weight.pieces]
    assert all(bool((count >= 1).all()) for count in seen.values())


@pytest.mark.parametrize("layout", [Layout(4, tensor=2, pipeline=2), Layout(4, tensor=4)])
def test_trainer_ranks_hold_every_bias_once_cut_like_its_weight(layout: Layout) -> None:
    arch = architecture("qwen2")
    covered = {name: torch.zeros(shape) for name, shape in hf_shapes(arch).items() if name.endswith(".bias")}
    for rank in range(layout.world):
        held = {entry.name: entry for entry in local_parameters(arch, layout, layout.coordinates(rank))}
        for bias in (entry for entry in held.values() if entry.name.endswith("linear_qkv.bias")):
            weight = held[bias.name.replace("bias", "weight")]
            assert [(piece.rows, piece.at) for piece in bias.pieces] == [(p.rows, p.at) for p in weight.pieces]
            for piece in bias.pieces:
                covered[piece.tensor][slice(*piece.rows)] += 1
    assert covered and all(bool((count == 1).all()) for count in covered.values())


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies_are_those_of_transformers_to_the_bit(factor: float) -> None:
    arch = architecture("llama", head_dim=128, rope_theta=5e5, rope_scaling=LLAMA3 | {"factor": factor})
    settings = family_of(arch).megatron_settings(arch)
    assert settings.model == {"position_embedding_type": "rope", "rope_scaling": True, "rope_scaling_factor": factor}
    ours = RotaryEmbedding(128, 1.0, rotary_base=500000, rope_scaling=True, rope_scaling_factor=factor,
                           use_cpu_initialization=True).inv_freq  # fmt: skip
    config = AutoConfig.for_model(**arch.to_hugging_face("float32"))
    theirs, scale = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert scale == 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 128}, "rope_type='linear'"),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 128}, "rope_type='dynamic'"),
        (LLAMA3 | {"low_freq_factor": 2.0}, "low_freq_factor=2.0: the trainer computes llama3 with 1 only"),
        (LLAMA3 | {"original_max_position_embeddings": 4096}, "original_max_position_embeddings=4096"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor=missing"),
    ],
)
def test_a_scaling_that_is_computed_otherwise_is_refused_by_name(
    tmp_path: Path, scaling: dict[str, Any], message: str
) -> None:
    shape = {**SHAPE, **MODELS["llama"]}
    for spelling in ("rope_scaling", "rope_parameters"):
        found = refusals(*write_config(tmp_path, **shape, **{spelling: scaling}))
        assert any(place == "model.architecture.rope_scaling" and message in said for place, said, _ in found)
    overrides = [f"model.architecture.{key}={value}" for key, value in {**DENSE, **shape}.items()]
    assert any(message in said for _, said, _ in refusals(*overrides, f"model.architecture.rope_scaling={scaling}"))


def test_the_scaling_of_the_published_llamas_runs_and_qwen3_has_none_of_it() -> None:
    fields, faults = read_rope({"rope_scaling": LLAMA3}, 128, BY_TYPE["llama"].rope_types)
    assert (fields["rope_scaling"], faults) == (LLAMA3, [])
    _, (fault,) = read_rope({"rope_scaling": LLAMA3}, 128, BY_TYPE["qwen3"].rope_types)
    assert "rope_type='llama3'" in fault.message


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention_bias", True), ("mlp_bias", True), ("pretraining_tp", 2), ("use_sliding_window", True),
     ("hidden_act", "gelu")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_what_the_trainer_would_leave_out_is_refused_with_its_value(
    tmp_path: Path, name: str, key: str, value: Any
) -> None:
    overrides = write_config(tmp_path, **SHAPE, **MODELS[name], **{key: value})
    said = f"{quote(value)}: models/llama computes {key}={quote(family_value(name, key))} only"
    assert [(place, message) for place, message, _ in refusals(*overrides)] == [(f"model.architecture.{key}", said)]


def family_value(name: str, key: str) -> Any:
    row = family_of(architecture(name)).config_keys[MODELS[name]["model_type"]].allowed(key)
    assert row is not None
    return row.values[0]


def test_an_unknown_model_type_names_the_families_that_run(tmp_path: Path) -> None:
    ((key, message, fix),) = refusals("model.architecture.model_type=mamba")
    assert (key, message) == ("model.architecture.model_type", "model_type='mamba' is no model that runs here")
    assert all(model_type in fix for model_type in BY_TYPE)
    ((key, _, _),) = refusals(*write_config(tmp_path, model_type="mamba"))
    assert key == "model.path"


def test_experts_and_unknown_keys_of_a_dense_family_are_refused() -> None:
    found = refusals("model.architecture.model_type=llama")
    assert found[0][0] == "model.architecture" and "has no experts" in found[0][1]
    dense = ("model_type=llama", "num_experts=0", "num_experts_per_tok=0", "moe_intermediate_size=0")
    overrides = [f"model.architecture.{value}" for value in (*dense, "shared_expert_intermediate_size=8")]
    assert [key for key, _, _ in refusals(*overrides)] == ["model.architecture.shared_expert_intermediate_size"]


def test_heads_that_vllm_would_make_otherwise_are_refused() -> None:
    dense = ("model_type=qwen2", "num_experts=0", "num_experts_per_tok=0", "moe_intermediate_size=0", "head_dim=64")
    ((key, message, _),) = refusals(*(f"model.architecture.{value}" for value in dense))
    assert key == "model.architecture" and "head_dim=64" in message


def test_faults_of_the_recipe_and_of_its_architecture_are_listed_together() -> None:
    keys = [key for key, _, _ in refusals("trainer.a=1", "model.architecture.num_expert=3")]
    assert keys == ["trainer.a", "model.architecture.num_expert"]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_dense_family_can_be_planned(name: str) -> None:
    values = {**SHAPE, **MODELS[name], "head_dim": 16, "num_experts": 0, "num_experts_per_tok": 0}
    overrides = [f"model.architecture.{key}={value}" for key, value in {**values, "moe_intermediate_size": 0}.items()]
    # vLLM's attention on CPUs has no heads of 16.
    plan = make_plan(load_recipe(TINY, [*overrides, "trainer.tensor_parallel=2", "placement.gpu=h100"]))
    assert not plan.refused, [str(finding) for finding in plan.findings]
    # Products of a token by hand: queries, keys, values, output, three of the feed-forward layer, the head; no bias.
    layer = 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 96
    assert flops.linear_flops(plan.recipe.arch) == 2 * (2 * layer + 96 * 64)
    assert flops.active_parameters(plan.recipe.arch) == flops.parameters(plan.recipe.arch)


def names_in(tree: ast.AST) -> Iterator[ast.AST]:
    """Comparisons with a model's name, and imports of a family's folder."""
    families = {f"gspo_megatron.models.{family.name}" for family in FAMILIES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            operands = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
            if any(isinstance(part, ast.Constant) and part.value in BY_TYPE for part in operands):
                yield node
            if any(isinstance(part, ast.Attribute) and part.attr == "model_type" for part in operands):
                yield node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(tuple(families)):
            yield node


def test_nothing_outside_models_asks_for_a_family_by_name() -> None:
    places = [path for folder in ("gspo_megatron", "launch", "tools") for path in (ROOT / folder).rglob("*.py")]
    outside = [path for path in places if ROOT / "gspo_megatron" / "models" not in path.parents]
    assert len(outside) > 100
    wrong = [f"{path}: {ast.unparse(node)}" for path in outside for node in names_in(ast.parse(path.read_text()))]
    assert not wrong, wrong
    assert list(names_in(ast.parse("if arch.model_type == 'x': pass")))
    assert list(names_in(ast.parse("from gspo_megatron.models.qwen3 import QWEN3")))


@pytest.mark.parametrize("name", ["tiny_moe", "qwen3_30b_a3b_gspo_100k"])
def test_a_resolved_recipe_of_an_earlier_version_still_reads_the_same(name: str) -> None:
    """Written by commit 3b203e7, when one class held the keys of Qwen3 only; a run of it must resume."""
    before = load_resolved(ROOT / "tests" / "data" / "resolved" / f"{name}.yaml")
    now = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert before.arch == now.arch
    was = {"kv_cache_gib": 1.0}  # the default then; no default is asserted here, a run keeps what it has
    assert before.model_dump(mode="json") == with_sections(now.model_dump(mode="json"), rollout=was)
