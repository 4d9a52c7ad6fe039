"""Hugging Face directories: what is wrong with one is said at once, and transformers reads what we write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import Piece, hf_shapes
from gspo_megatron.models.weight_files import INDEX_FILE
from gspo_megatron.policy import weights

SMALL = [
    f"model.architecture.{value}"
    for value in ("hidden_size=32", "num_hidden_layers=2", "num_experts=4", "moe_intermediate_size=32")
]


def architecture(*overrides: str) -> Architecture:
    arch = load_recipe(Path("recipes/tiny_moe.yaml"), [*SMALL, *overrides]).arch
    return arch


def whole(name: str, shape: tuple[int, ...]) -> Piece:
    return Piece(name, (0, shape[0]), (0, shape[1]) if len(shape) == 2 else None, (0, shape[0]))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(weights, "SHARD_BYTES", 40_000)
    arch = architecture()
    read = weights.random_pieces(arch, 1)
    tensors = ((name, read(whole(name, shape))) for name, shape in hf_shapes(arch).items())
    weights.save_hf(tensors, arch.to_hugging_face("float32"), tmp_path / "model")
    return tmp_path / "model"


def test_every_fault_of_a_directory_is_listed_at_once(directory: Path) -> None:
    index = json.loads((directory / INDEX_FILE).read_text())
    place = index["weight_map"]
    first = directory / place["model.embed_tokens.weight"]
    held = load_file(first)
    names = [name for name in held if name != "model.embed_tokens.weight"]
    held["model.embed_tokens.weight"] = held["model.embed_tokens.weight"][:-1].clone()
    held[names[0]] = held[names[0]].to(torch.int8)
    save_file({name: tensor for name, tensor in held.items() if name != names[1]}, first)
    missing = place.pop("model.norm.weight")
    place["model.layers.0.mlp.shared_expert.gate_proj.weight"] = missing
    broken = sorted(set(place.values()))[-2]
    (directory / broken).write_bytes(b"torn")
    (directory / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not hold this model") as refusal:
        weights.safetensors_pieces(directory, architecture())
    for sentence in (
        f"model.embed_tokens.weight in {first.name} has shape (95, 32), expected (96, 32) (vocab_size=96)",
        f"{names[0]} in {first.name} has type I8, expected one of F32, BF16, F16, F64",
        f"{names[1]} is not in {first.name}, where {INDEX_FILE} has it",
        "model.norm.weight is missing",
        f"model.layers.0.mlp.shared_expert.gate_proj.weight in {missing} is unknown",
        f"{broken} cannot be read",
    ):
        assert sentence in str(refusal.value)


def test_another_architecture_is_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.2\..* is missing"):
        weights.safetensors_pieces(directory, architecture("model.architecture.num_hidden_layers=3"))


def test_a_tied_model_may_bring_its_head_and_another_may_not(tmp_path: Path) -> None:
    """Published tied models hold the head beside the embedding that it is."""
    dense = ("model_type=qwen3", "num_experts=0", "num_experts_per_tok=0", "moe_intermediate_size=0")
    tied = architecture(*(f"model.architecture.{value}" for value in (*dense, "tie_word_embeddings=true")))
    read = weights.random_pieces(tied, 1)
    tensors = {name: read(whole(name, shape)) for name, shape in hf_shapes(tied).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    weights.save_hf(iter(tensors.items()), tied.to_hugging_face("float32"), tmp_path / "tied")
    weights.safetensors_pieces(tmp_path / "tied", tied)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(1)
    weights.save_hf(iter(tensors.items()), tied.to_hugging_face("float32"), tmp_path / "odd")
    with pytest.raises(ValueError, match=r"q_proj\.bias in model-00001\.safetensors is unknown"):
        weights.safetensors_pieces(tmp_path / "odd", tied)


def test_transformers_reads_what_is_written(directory: Path) -> None:
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32)
    read = weights.safetensors_pieces(directory, architecture())
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    expected = read(whole(name, hf_shapes(architecture())[name]))
    stacked = dict(model.named_parameters())["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(stacked[3].chunk(2)[1], expected)


def test_what_transformers_writes_is_read(directory: Path, tmp_path: Path) -> None:
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    ours, theirs = (weights.safetensors_pieces(place, architecture()) for place in (directory, tmp_path / "again"))
    for name, shape in hf_shapes(architecture()).items():
        assert torch.equal(ours(whole(name, shape)), theirs(whole(name, shape)))
