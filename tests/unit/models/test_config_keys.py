"""The tables of the keys of a `config.json`, against transformers' classes and code, and what single keys become."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from gspo_megatron.config import RecipeError
from gspo_megatron.models import load_recipe, read_architecture, rope
from gspo_megatron.models.config_keys import ANY_MODEL, HEADS, IGNORED, QUOTIENT, ConfigKeys
from gspo_megatron.models.registry import BY_TYPE
from gspo_megatron.plan import make_plan
from tests.places import ROOT

TINY = ROOT / "recipes" / "tiny_moe.yaml"
DENSE: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 128,
}  # fmt: skip
MOE = {
    **DENSE, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0}
TYPES = sorted(BY_TYPE)


def keys_of(model_type: str) -> ConfigKeys:
    return BY_TYPE[model_type].config_keys[model_type]


def known(model_type: str) -> set[str]:
    keys = keys_of(model_type)
    return {*keys.fields, *keys.only, *keys.aliases, *ANY_MODEL, *rope.KEYS, *IGNORED, "model_type"}


def read(directory: Path, values: dict[str, Any]) -> Any:
    (directory / "config.json").write_text(json.dumps(values))
    return read_architecture(directory)


def refused(directory: Path, values: dict[str, Any]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(directory, values)
    return [f"{finding.key}: {finding.message}" for finding in caught.value.findings]


@pytest.mark.parametrize("model_type", TYPES)
def test_every_key_and_default_of_transformers_is_in_the_table(model_type: str) -> None:
    cls = type(AutoConfig.for_model(model_type))
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(cls)
    }
    assert defaults.keys() <= known(model_type)
    keys = keys_of(model_type)
    assert keys.aliases == {new: old for old, new in cls.attribute_map.items()}
    for name in keys.fields.keys() & defaults.keys():
        row = keys.fields[name]
        assert (None if row.default in (HEADS, QUOTIENT) else row.default) == defaults[name], name
    # What it is once transformers has filled it in, e.g. a list of layers.
    made = cls().to_dict()
    for name, row in (ANY_MODEL | dict(keys.only)).items():
        assert name not in made or row.allows(made[name], made["num_hidden_layers"]), name


def test_every_name_of_a_configuration_within_one_is_refused() -> None:
    """transformers takes the inner one for the model (`get_text_config`)."""
    source = textwrap.dedent(inspect.getsource(PreTrainedConfig.get_text_config))
    tuples = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Tuple)]
    names = {item.value for node in tuples for item in node.elts if isinstance(item, ast.Constant)}
    assert "text_config" in names and names <= ANY_MODEL.keys()


@pytest.mark.parametrize("model_type", TYPES)
def test_every_key_that_transformers_computes_with_is_in_the_table(model_type: str) -> None:
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    found = set[str]()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("config", "self.config"):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            of, name, *_ = node.args
            found |= {ast.literal_eval(name)} if ast.unparse(of) in ("config", "self.config") else set()
    assert {"rms_norm_eps", "hidden_act", "head_dim"} <= found
    assert found <= known(model_type)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({**DENSE, "use_sliding_window": True, "sliding_window": 8}, "use_sliding_window: true"),
        ({**DENSE, "hidden_act": "gelu"}, "hidden_act: 'gelu': models/qwen3 computes hidden_act='silu' only"),
        ({**DENSE, "attention_bias": True}, "attention_bias: true"),
        ({**MOE, "mlp_only_layers": [1]}, "mlp_only_layers: [1]"),
        ({**MOE, "decoder_sparse_step": 2}, "decoder_sparse_step: 2"),
        ({**DENSE, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({**DENSE, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_fact"),
        ({**DENSE, "layer_types": ["full_attention", "sliding_attention"]}, "in every layer only"),
        ({**DENSE, "layer_types": ["full_attention"] * 3}, "layer_types"),
        ({**MOE, "num_local_experts": 1}, "num_experts_per_tok=2 is not in 1..num_experts=1"),
        ({**DENSE, "num_experts": 4}, "num_experts=4 with model_type=qwen3"),
        ({**DENSE, "rope_scaling": YARN | {"factor": None}}, "factor is null"),
        ({**DENSE, "rope_scaling": YARN | {"original_max_position_embeddings": 12.5}}, "whole number"),
        ({**DENSE, "rope_scaling": {"rope_type": ["yarn"]}}, "rope_type=['yarn']"),
        ({**DENSE, "rope_scaling": {"rope_type": None, "type": "yarn"}}, "rope_type=null"),
        ({**DENSE, "rope_scaling": [1]}, "[1] is no mapping"),
        ({**DENSE, "rope_theta": True}, "rope_theta=true"),
        ({**DENSE, "rope_theta": 1}, "rope_theta=1 is no number above 1"),
        ({**DENSE, "rope_parameters": {"rope_theta": 1e-300}}, "rope_theta=1e-300 is no number above 1"),
        ({**DENSE, "text_config": {**DENSE, "hidden_size": 32}}, "text_config: {"),
        ({**DENSE, "decoder": {"num_hidden_layers": 1}}, "decoder: {'num_hidden_layers': 1}"),
        ({**DENSE, "attribute_map": {"hidden_size": "intermediate_size"}}, "attribute_map: {"),
        ({**MOE, "shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size: 64: models/qwen3 computes"),
        ({**MOE, "n_shared_experts": 1}, "n_shared_experts: 1"),
        ({**DENSE, "rope_theta": float("nan")}, "rope_theta=nan"),
        ({**DENSE, "head_dim": 17}, "head_dim=17 is odd"),
        ({**DENSE, "hidden_size": 64.0}, "hidden_size: 64.0 is no whole number"),
        ({**DENSE, "tie_word_embeddings": 1}, "tie_word_embeddings: 1 is no true or false"),
        ({**DENSE, "rms_norm_eps": None}, "rms_norm_eps: null"),
        ({**DENSE, "is_causal": None}, "is_causal: null"),
        ({**DENSE, "model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 3}, "not a multiple of"),
        ({**DENSE, "model_type": "qwen2", "head_dim": 32}, "head_dim=32"),
        ({**MOE, "num_experts_per_tok": 1, "norm_topk_prob": True}, "norm_topk_prob=true with num_experts_per_tok=1"),
        ({**DENSE, "model_type": "qwen3_next"}, "model_type='qwen3_next' is no model"),
        ({**DENSE, "model_type": None}, "model_type=null is no model"),
        ({**DENSE, "model_type": ["qwen3"]}, "is no model that runs here"),
        ({"text_config": DENSE}, "has no model_type"),
    ],
)
def test_a_value_that_is_computed_otherwise_is_refused_by_name(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    found = refused(tmp_path, values)
    assert any(words in said for said in found), found


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({**DENSE}, {"rope_theta": 1e4, "rope_scaling": None}),
        ({**DENSE, "rope_theta": 1e6}, {"rope_theta": 1e6}),
        ({**DENSE, "rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e4}}, {"rope_theta": 5e4}),
        ({**DENSE, "rope_scaling": {"rope_theta": 2e4}, "rope_parameters": {"rope_theta": 5e4}}, {"rope_theta": 2e4}),
        ({**DENSE, "rope_scaling": {"type": "default"}}, {"rope_scaling": None}),
        ({**DENSE, "rope_scaling": {"type": "linear", "rope_type": "default"}}, {"rope_scaling": None}),
        ({**DENSE, "rope_scaling": YARN}, {"rope_scaling": YARN | {"original_max_position_embeddings": 128}}),
        (
            {**DENSE, "rope_scaling": YARN | {"beta_fast": 0, "mscale": None, "original_max_position_embeddings": 9},
             "original_max_position_embeddings": 64},
            {"rope_scaling": YARN | {"original_max_position_embeddings": 64}},
        ),
        (MOE, {"norm_topk_prob": False, "num_experts": 4}),
        ({**MOE, "num_local_experts": 8}, {"num_experts": 8}),
        ({**MOE, "head_dim": 64}, {"head_dim": 64}),
        ({**DENSE, "num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({**DENSE, "model_type": "llama", "head_dim": None}, {"head_dim": 16, "rms_norm_eps": 1e-6}),
        ({**DENSE, "hidden_act": "swish", "layer_types": ["attention", "full_attention"]}, {"head_dim": 16}),
        ({**DENSE, "norm_topk_prob": True}, {"norm_topk_prob": False}),
    ],
)  # fmt: skip
def test_a_value_is_the_one_that_transformers_takes(
    tmp_path: Path, values: dict[str, Any], wanted: dict[str, Any]
) -> None:
    arch = read(tmp_path, values)
    assert {name: getattr(arch, name) for name in wanted} == wanted


@pytest.mark.parametrize("name", ["head_dim", "num_key_value_heads", "vocab_size", "rms_norm_eps", "intermediate_size"])
@pytest.mark.parametrize("model_type", TYPES)
def test_an_absent_key_is_what_transformers_fills_in(tmp_path: Path, model_type: str, name: str) -> None:
    whole = {**MOE, "model_type": model_type, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 512}
    if model_type != "qwen3_moe":
        whole = {key: value for key, value in whole.items() if "expert" not in key and not key.startswith("moe")}
    arch = read(tmp_path, {key: value for key, value in whole.items() if key != name})
    theirs = AutoConfig.from_pretrained(tmp_path)
    wanted = getattr(theirs, name, theirs.hidden_size // theirs.num_attention_heads)
    assert getattr(arch, name) == wanted


def test_a_recipe_follows_the_same_rules_and_names_its_sizes() -> None:
    written = [
        "rope_parameters={rope_type: yarn, factor: 2, rope_theta: 2.0e+4}", "num_local_experts=4", "head_dim=16",
        "layer_types=[full_attention, full_attention, full_attention, full_attention]",
    ]  # fmt: skip
    arch = load_recipe(TINY, [f"model.architecture.{value}" for value in written]).arch
    assert (arch.num_experts, arch.rope_theta) == (4, 2e4)
    assert arch.rope_scaling == {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 128}
    for override, key in (
        ("mlp_only_layers=[1]", "mlp_only_layers"), ("is_causal=false", "is_causal"), ("use_cache=true", "use_cache"),
        ("partial_rotary_factor=0.5", "rope_scaling"), ("torch_dtype=float16", "torch_dtype"),
    ):  # fmt: skip
        with pytest.raises(RecipeError) as caught:
            load_recipe(TINY, [f"model.architecture.{override}"])
        assert [finding.key for finding in caught.value.findings] == [f"model.architecture.{key}"]


def test_a_key_that_nobody_reads_is_a_named_warning(tmp_path: Path) -> None:
    read(tmp_path, {**DENSE, "shared_expert_intermediate_size": 0, "n_group": 2, "logit_scale": 0.5, "use_cache": True})
    recipe = load_recipe(TINY, [f"model.path={tmp_path}", "model.architecture=null", "tokenizer.path=x"])
    plan = make_plan(recipe)
    (said,) = [finding for finding in plan.findings if finding.code == "model-key-unread"]
    assert said.severity == "warning" and said.key == "model.path"
    assert "logit_scale, n_group, which neither" in said.message
