"""Random `config.json` files: the trainer computes what transformers computes from them, or refuses a key by name."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from gspo_megatron.config import RecipeError
from gspo_megatron.data.packing import collate
from gspo_megatron.models import load_recipe, read_architecture
from gspo_megatron.models.registry import BY_TYPE
from gspo_megatron.parallel import Layout
from gspo_megatron.policy import mesh
from gspo_megatron.policy.policy import Policy
from gspo_megatron.policy.weights import safetensors_pieces
from gspo_megatron.types import Sample, SampleRef
from tests.places import ROOT

CASES = int(os.environ.get("GSPO_FUZZ", "1000")) // 10
BOUND = 1e-4
LENGTH = 48
RECIPE = load_recipe(ROOT / "recipes" / "tiny_moe.yaml")
CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
ABSENT = object()
SAME: dict[str, list[Any]] = {
    "rms_norm_eps": [1e-5, 1e-3, ABSENT],
    "tie_word_embeddings": [True, False, ABSENT],
    "initializer_range": [0.3, ABSENT],
    "hidden_act": ["silu", "swish", ABSENT],
    "attention_dropout": [0.0, ABSENT],
    "attention_bias": [False, ABSENT],
    "use_sliding_window": [False, ABSENT],
    "sliding_window": [None, 8],
    "max_window_layers": [0, 28],
    "layer_types": [["full_attention"] * 2, None, ABSENT],
    "pad_token_id": [None, 0],
    "torch_dtype": ["bfloat16"],
    "dtype": ["float16"],
    "use_cache": [True],
    "output_router_logits": [True],
    "temperature": [0.6],
    "_name_or_path": ["somewhere"],
    "a_note": ["of a user's own"],
    "partial_rotary_factor": [1.0],
}
"""Keys and values with which a model runs, whatever its type; some change it, some do not."""
OTHER: list[tuple[str, Any]] = [
    ("use_sliding_window", True), ("hidden_act", "gelu"), ("hidden_act", "gelu_pytorch_tanh"), ("hidden_act", None),
    ("attention_bias", True), ("attention_bias", 1), ("mlp_bias", True), ("mlp_only_layers", [0]),
    ("decoder_sparse_step", 2), ("partial_rotary_factor", 0.5), ("attention_dropout", 0.1), ("head_dim", 15),
    ("layer_types", ["full_attention", "sliding_attention"]), ("layer_types", ["full_attention"]),
    ("per_layer_config", {"0": {"intermediate_size": 48}}), ("is_causal", False), ("hidden_size", "64"),
    ("num_hidden_layers", True), ("rms_norm_eps", "1e-6"), ("tie_word_embeddings", "false"), ("vocab_size", None),
    ("num_attention_heads", 3), ("num_key_value_heads", 3), ("quantization_config", {"quant_method": "fp8"}),
    ("rope_theta", None), ("rope_theta", "1e6"),
    ("rope_parameters", {"rope_type": "linear", "factor": 2.0}),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "default", "factor": 2.0}),
    ("rope_scaling", {**YARN, "attention_factor": 1.5}), ("rope_scaling", {**YARN, "truncate": False}),
    ("rope_scaling", {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}), ("rope_scaling", {**YARN, "factor": None}),
    ("rope_scaling", {**YARN, "partial_rotary_factor": 0.5}), ("rope_scaling", {**LLAMA3, "low_freq_factor": 2.0}),
    ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}), ("rope_scaling", "yarn"),
]  # fmt: skip
"""One of these in a file may be refused; if it is not, transformers computes as the trainer does."""

THETAS = [1e4, 10000, 12345.5, 1e6, 5e5]
READ: Counter[bool] = Counter()
"""How many files were accepted, and how many refused."""


def draw_rotary(chance: random.Random, model_type: str) -> dict[str, Any]:
    """Rotary settings in one of the spellings, or in two that contradict each other."""
    kinds: list[dict[str, Any] | None] = [None, {}, {"rope_type": "default"}, {"type": "default"}]
    for extra in ({}, {"factor": 2.5}, {"beta_fast": 16, "beta_slow": 2.0}, {"beta_fast": None, "truncate": True}):
        kinds.append(YARN | extra)
    kinds.append({"type": "yarn", "factor": 3.0, "attention_factor": None, "mscale": 0, "partial_rotary_factor": 1.0})
    if model_type in ("llama", "qwen2"):
        kinds += [LLAMA3, LLAMA3 | {"factor": 32.0}]
    values: dict[str, Any] = {}
    spellings = (["rope_parameters"], ["rope_scaling"], ["rope_parameters", "rope_scaling"])
    for spelling in chance.choice([[], *spellings]):
        kind = chance.choice(kinds)
        values[spelling] = (
            kind if kind is None or chance.random() < 0.5 else kind | {"rope_theta": chance.choice(THETAS)}
        )
    if chance.random() < 0.5:
        values["rope_theta"] = chance.choice(THETAS)
    if chance.random() < 0.1:
        values["original_max_position_embeddings"] = chance.choice([16, 8192])
    return values


def draw_config(chance: random.Random) -> dict[str, Any]:
    """Keys of a `config.json`; about one in four has a value that may be refused."""
    model_type = chance.choice(sorted(CLASSES))
    heads, groups, width = chance.choice([(4, 2, 16), (2, 2, 32), (4, 1, 16), (8, 4, 8)])
    values: dict[str, Any] = {
        "model_type": model_type, "vocab_size": chance.choice([96, 101]), "hidden_size": heads * width,
        "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": 96,
        "max_position_embeddings": chance.choice([64, 128, ABSENT]), "head_dim": width,
    }  # fmt: skip
    if model_type != "qwen2":
        values["head_dim"] = chance.choice([width, 2 * width])
    if model_type != "qwen3" and chance.random() < 0.3:
        values["head_dim"] = chance.choice([None, ABSENT]) if model_type == "llama" else ABSENT
    if chance.random() < 0.2 and (model_type != "qwen3_moe" or heads % 4 == 0):
        values["num_key_value_heads"] = None if model_type != "qwen3_moe" else ABSENT
    if model_type == "qwen3_moe":
        name = chance.choice(["num_experts", "num_local_experts"])
        values |= {name: 4, "num_experts_per_tok": chance.choice([1, 2, 4]), "moe_intermediate_size": 32}
        values["norm_topk_prob"] = chance.choice([True, False, ABSENT])
        values |= chance.choice([{}, {"mlp_only_layers": []}, {"decoder_sparse_step": 1}, {"num_experts": 4}])
    for key in chance.sample(sorted(SAME), chance.randint(0, 5)):
        values[key] = chance.choice(SAME[key])
    values |= draw_rotary(chance, model_type)
    if chance.random() < 0.25:
        key, value = chance.choice(OTHER)
        values[key] = value
    return {key: value for key, value in values.items() if value is not ABSENT}


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """One rank in this process; its groups serve every model."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patched:
        dist.init_process_group("gloo", store=dist.FileStore(f"{directory}/store", 1), rank=0, world_size=1)
        shares = mesh.build_groups(Layout(1))
        patched.setattr(mesh, "build_groups", lambda _: shares)
        yield
        dist.destroy_process_group()


def their_model(config: Any) -> Any:
    """transformers' model with weights that are all at work."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model.eval()


def in_4x_format(saved: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 wrote of a configuration: rotary keys, number of experts and type under their old names."""
    older = {name: value for name, value in saved.items() if name not in ("rope_parameters", "dtype")}
    rope = dict(saved["rope_parameters"])
    older |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": saved["dtype"], "transformers_version": "4.51.0"}
    older["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    if "num_local_experts" in older:
        older["num_experts"] = older.pop("num_local_experts")
    return older


def compare(values: dict[str, Any], directory: Path) -> float | None:
    """The largest difference of a log-prob, or None where a key is refused by name."""
    (directory / "config.json").write_text(json.dumps(values))
    try:
        arch = read_architecture(directory)
    except RecipeError as error:
        known = {*values, "rope_scaling", "num_experts", "head_dim", "architecture"}
        assert {finding.key.rpartition(".")[2] for finding in error.findings} <= known, str(error)
        return None
    model = their_model(AutoConfig.from_pretrained(directory))
    model.save_pretrained(directory / "saved")
    assert type(model).__name__ == arch.to_hugging_face("float32")["architectures"][0]
    assert read_architecture(directory / "saved") == arch, "what transformers writes of it is another model"
    older = directory / "saved_by_4"
    older.mkdir()
    saved = json.loads((directory / "saved" / "config.json").read_text())
    (older / "config.json").write_text(json.dumps(in_4x_format(saved)))
    theirs, again = (AutoConfig.from_pretrained(place).to_dict() for place in (directory / "saved", older))
    names = {name: theirs[name] for name in ("transformers_version", "_name_or_path")}
    assert {**again, **names} == theirs, "this is not the 4.x format"
    assert read_architecture(older) == arch, "in the 4.x format it is another model"
    ids = np.random.default_rng(0).integers(0, arch.vocab_size, LENGTH)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0]
    theirs = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(ids[1:, None]))[:, 0]
    policy = Policy(RECIPE.with_arch(arch), torch.device("cpu"))
    policy.load(safetensors_pieces(directory / "saved", arch))
    ref = SampleRef("", 0, 0, 1, LENGTH - 1, 0.0, "stop", ())
    sample = Sample(ids, np.arange(LENGTH) > 0, np.zeros(LENGTH, np.float32), ref)
    ours, _ = policy.probe(collate([sample]))
    return float((ours[:-1] - theirs).abs().max())


def test_the_trainer_computes_what_transformers_reads() -> None:
    READ.clear()
    assert CLASSES.keys() == BY_TYPE.keys(), "every model_type is drawn"

    @settings(max_examples=CASES, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        values = draw_config(random.Random(seed))
        note(str(values))
        with tempfile.TemporaryDirectory() as directory:
            difference = compare(values, Path(directory))
        READ[difference is not None] += 1
        assert difference is None or difference < BOUND, difference

    check()
    assert READ[True] > 0.6 * READ.total(), READ
