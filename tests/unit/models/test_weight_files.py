"""What is wrong with the weights of a directory: found by the headers, before a process starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron import cli
from gspo_megatron.models import load_recipe, read_architecture, weight_files
from gspo_megatron.models.hf_table import HEAD, hf_shapes
from gspo_megatron.models.weight_files import INDEX_FILE, SINGLE_FILE, find_weights, head_fault
from gspo_megatron.plan import make_plan
from tests.places import ROOT

TINY = ROOT / "recipes" / "tiny_moe.yaml"
CONFIG: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32, "max_position_embeddings": 128,
}  # fmt: skip
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model in one file."""
    return write(tmp_path / "model")


def write(directory: Path, dtype: torch.dtype = torch.bfloat16, **keys: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | keys))
    shapes = hf_shapes(read_architecture(directory))
    save_file({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}, directory / SINGLE_FILE)
    return directory


def split(directory: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """The same tensors in two files with an index."""
    tensors = load_file(directory / SINGLE_FILE)
    (directory / SINGLE_FILE).unlink()
    names = sorted(tensors)
    index: dict[str, Any] = {"weight_map": {}}
    for number, part in enumerate((names[:9], names[9:])):
        save_file({name: tensors[name] for name in part}, directory / f"part-{number}.safetensors")
        index["weight_map"] |= dict.fromkeys(part, f"part-{number}.safetensors")
    change(index)
    (directory / INDEX_FILE).write_text(json.dumps(index))


def change(directory: Path, **tensors: torch.Tensor | None) -> None:
    held = load_file(directory / SINGLE_FILE) | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, directory / SINGLE_FILE)


def lfs_pointer(directory: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3554214621\n"
    (directory / SINGLE_FILE).write_text(text)


def cut(directory: Path) -> None:
    whole = (directory / SINGLE_FILE).read_bytes()
    (directory / SINGLE_FILE).write_bytes(whole[:-1])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "git-lfs": (lfs_pointer, "model.safetensors is a pointer of git-lfs and not the file: run git lfs pull"),
    "cut": (cut, "model.safetensors cannot be read ("),
    "empty": (lambda d: (d / SINGLE_FILE).write_bytes(b""), "model.safetensors cannot be read ("),
    "header": (lambda d: (d / SINGLE_FILE).write_bytes(b"\xff" * 64), "model.safetensors cannot be read ("),
    "nothing": (lambda d: (d / SINGLE_FILE).unlink(), "neither model.safetensors.index.json nor model.safetensors is"),
    "broken link": (
        lambda d: ((d / SINGLE_FILE).unlink(), (d / SINGLE_FILE).symlink_to("../blobs/4d7a2146")),
        "model.safetensors is a link to ../blobs/4d7a2146, which is not there",
    ),
    "index forgotten": (
        lambda d: (split(d), (d / INDEX_FILE).unlink()),
        "nor model.safetensors is there; it holds part-0.safetensors, part-1.safetensors, which is not read: save",
    ),
    "index that is a directory": (
        lambda d: (split(d), (d / INDEX_FILE).unlink(), (d / INDEX_FILE).mkdir()), "json nor model.safetensors is there"
    ),
    "index with a broken link": (
        lambda d: (split(d), (d / "part-1.safetensors").unlink(), (d / "part-1.safetensors").symlink_to("gone")),
        "part-1.safetensors is a link to gone, which is not there",
    ),
    "old format": (lambda d: (d / SINGLE_FILE).rename(d / "pytorch_model.bin"), "it holds pytorch_model.bin, which is"),
    "no weight_map": (lambda d: split(d, dict.clear), "model.safetensors.index.json has no weight_map"),
    "weight_map of numbers": (lambda d: split(d, lambda i: i["weight_map"].update(x=1)), "does not lead from tensors"),
    "index that is a list": (
        lambda d: (split(d), (d / INDEX_FILE).write_text("[]")), "model.safetensors.index.json cannot be read ("
    ),
    "index that is cut": (lambda d: (split(d), (d / INDEX_FILE).write_text("{")), "json cannot be read ("),
    "index with a path": (lambda d: split(d, lambda i: i["weight_map"].update(x="../x")), "'../x', which is no file"),
    "index without a file": (
        lambda d: (split(d), (d / "part-1.safetensors").unlink()),
        "part-1.safetensors is missing; model.safetensors.index.json has 16 tensors there",
    ),
    "file that is git-lfs": (
        lambda d: (split(d), lfs_pointer(d), (d / SINGLE_FILE).rename(d / "part-0.safetensors")),
        "part-0.safetensors is a pointer of git-lfs",
    ),
    "index without a tensor": (
        lambda d: split(d, lambda i: i["weight_map"].pop(EMBEDDING)), f"{EMBEDDING} is missing: no file holds it"
    ),
    "index that is wrong": (
        lambda d: split(d, lambda i: i["weight_map"].update({EMBEDDING: "part-1.safetensors"})),
        f"{EMBEDDING} is not in part-1.safetensors, where model.safetensors.index.json has it",
    ),
    "vocabulary": (
        lambda d: change(d, **{EMBEDDING: torch.zeros(128, 32)}),
        f"{EMBEDDING} in model.safetensors has shape (128, 32), expected (96, 32) (vocab_size=96)",
    ),
    "shape": (
        lambda d: change(d, **{"model.norm.weight": torch.zeros(31)}),
        "model.norm.weight in model.safetensors has shape (31,), expected (32,)",
    ),
    "type": (
        lambda d: change(d, **{"model.norm.weight": torch.zeros(32, dtype=torch.float8_e4m3fn)}),
        "model.norm.weight in model.safetensors has type F8_E4M3, expected one of F32",
    ),
    "missing": (lambda d: change(d, **{HEAD: None}), "lm_head.weight is missing"),
    "bias": (
        lambda d: change(d, **{"model.layers.1.self_attn.q_proj.bias": torch.zeros(32)}),
        "model.layers.1.self_attn.q_proj.bias in model.safetensors is unknown: qwen3 has no such tensor",
    ),
    "without a prefix": (
        lambda d: change(d, **{"norm.weight": torch.zeros(32)}), "norm.weight in model.safetensors is unknown"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_a_finding_that_names_file_and_tensor(directory: Path, name: str) -> None:
    spoil, words = FAULTS[name]
    spoil(directory)
    plan = make_plan(load_recipe(TINY, [f"model.path={directory}", "model.architecture=null"]))
    found = [finding for finding in plan.findings if finding.code == "model-weights-differ"]
    assert plan.refused and any(words in finding.message for finding in found), found
    assert all(finding.key == "model.path" for finding in found)


def test_train_refuses_before_a_process_starts(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lfs_pointer(directory)
    run = directory / "run"
    command = ["train", str(TINY), f"model.path={directory}", "model.architecture=null", f"run.directory={run}"]
    assert cli.main(command) == 2
    assert "git lfs pull" in capsys.readouterr().err and not run.exists()
    shape = [f"model.architecture.{name}={value}" for name, value in CONFIG.items()]
    elsewhere = ["model.architecture.num_experts=0", "model.architecture.num_experts_per_tok=0", "model.path=not/here"]
    assert cli.main(["train", str(TINY), *shape, *elsewhere, "model.architecture.moe_intermediate_size=0"]) == 2
    assert "not/here is no directory here" in capsys.readouterr().err


def test_a_model_elsewhere_is_an_info(tmp_path: Path) -> None:
    plan = make_plan(load_recipe(TINY, [f"model.path={tmp_path / 'nowhere'}"]))
    (said,) = [finding for finding in plan.findings if finding.key == "model.path"]
    assert (said.code, said.severity) == ("model-not-here", "info") and "is not found here" in said.message


def test_a_file_that_may_not_be_read_is_not_called_broken(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = read_architecture(directory)

    def open_it(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(weight_files, "safe_open", open_it)
    (said,) = find_weights(directory, arch).faults
    assert said == "model.safetensors cannot be read (Permission denied): see that this user can read it"


def test_whole_files_have_no_fault(directory: Path) -> None:
    arch = read_architecture(directory)
    assert find_weights(directory, arch).faults == ()
    # transformers reads the single file where both are there.
    (directory / INDEX_FILE).write_text("{}")
    assert find_weights(directory, arch).faults == ()
    (directory / INDEX_FILE).unlink()
    change(directory, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert find_weights(directory, arch).faults == ()
    split(directory)
    assert find_weights(directory, arch).faults == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_head_beside_tied_embeddings_must_be_the_embedding(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = write(tmp_path / "tied", dtype, tie_word_embeddings=True)
    arch, values = read_architecture(directory), torch.arange(96 * 32).view(96, 32).to(dtype)
    change(directory, **{EMBEDDING: values, HEAD: values.clone()})
    found = find_weights(directory, arch)
    assert (found.faults, head_fault(found.places, arch)) == ((), None)
    for other in (values + 1, values[:95].clone(), values.to(torch.float16)):
        change(directory, **{HEAD: other})
        said = head_fault(find_weights(directory, arch).places, arch)
        assert said is not None and "lm_head.weight in model.safetensors differs" in said
    plan = make_plan(load_recipe(TINY, [f"model.path={directory}", "model.architecture=null"]))
    assert plan.refused and any("tie_word_embeddings=true" in finding.message for finding in plan.findings)
