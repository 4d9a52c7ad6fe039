"""An export has a tokenizer, a template and stop ids: transformers reads from it what the run read."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gspo_megatron.cli import main
from gspo_megatron.commands.train_run import prepare_run
from gspo_megatron.config import Recipe, RecipeError
from gspo_megatron.data.model_directory import write_tokenizer
from gspo_megatron.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import Piece, hf_shapes
from gspo_megatron.policy import weights
from gspo_megatron.run_dir import RunDir

TINY = Path("recipes/tiny_moe.yaml")
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"

TEXTS = ["the cat sat on 12 mats ", "What is 3+45? \ufb01ne \u2460 Gr\u00fc\u00dfe", "a mat and a cat"]


def export(recipe: Recipe, run: Path, directory: Path) -> Path:
    """What the trainer writes at the end of a run."""
    arch = recipe.arch
    read = weights.random_pieces(arch, 1)
    tensors = (
        (name, read(Piece(name, (0, shape[0]), (0, shape[1]) if len(shape) == 2 else None, (0, shape[0]))))
        for name, shape in hf_shapes(arch).items()
    )
    config = arch.to_hugging_face(recipe.model.dtype)
    weights.save_hf(
        tensors, config, directory, complete=lambda place: write_tokenizer(recipe, RunDir(run).tokenizer, place)
    )
    return directory


@pytest.fixture
def own_tokenizer(tmp_path: Path) -> Path:
    """A Hugging Face tokenizer as transformers saves it, with a template and two stop ids."""
    words = {
        word: number for number, word in enumerate(["<unk>", "</s>", "<|im_end|>", "[", "]", "user", "one", "two"])
    }
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE)
    fast.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": [2, 1], "temperature": 0.6}')
    (tmp_path / "tokenizer" / "pytorch_model.bin").write_bytes(b"weights of somebody")
    return tmp_path / "tokenizer"


def test_a_sentencepiece_run_leaves_a_model_to_chat_with(tmp_path: Path) -> None:
    recipe = load_recipe(TINY, [f"run.directory={tmp_path / 'run'}"])
    prepare_run(recipe)
    before = os.umask(0o022)
    try:
        out = export(recipe, tmp_path / "run", tmp_path / "out")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in out.iterdir()} == {"0o644"}
    ours = load_tokenizer(recipe.tokenizer, None)
    theirs: Any = AutoTokenizer.from_pretrained(out)
    question = "Calculate 879 + 974."
    chat = [{"role": "user", "content": question}]
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids == ours.encode_prompt(question)
    answer = ours.encode_response("<|work|>9+4=13 1853")
    assert theirs.decode(answer, skip_special_tokens=True) == ours.decode(answer) == "<|work|>9+4=13 1853"
    assert json.loads((out / "generation_config.json").read_text()) == {"pad_token_id": 2, "eos_token_id": [1]}
    assert theirs.eos_token_id == 1 and theirs.pad_token_id == 2


def test_an_export_is_the_next_model_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(TINY, [f"run.directory={tmp_path / 'run'}"])
    prepare_run(recipe)
    out = export(recipe, tmp_path / "run", tmp_path / "out")
    words = [
        f"model.path={out}",
        "model.architecture=null",
        "tokenizer={kind: huggingface, path: null}",
        "cold_start=null",
    ]
    assert main(["plan", str(TINY), *words]) == 0, capsys.readouterr()
    after = load_recipe(TINY, words)
    assert after.arch == recipe.arch
    assert load_tokenizer(after.tokenizer, after.model.path).encode_prompt("Solve 1 + 1.") == load_tokenizer(
        recipe.tokenizer, None
    ).encode_prompt("Solve 1 + 1.")
    weights.safetensors_pieces(out, after.arch)
    prepare_run(load_recipe(TINY, [*words, f"run.directory={tmp_path / 'next'}"]))
    again = export(after, tmp_path / "next", tmp_path / "again")
    files = [path.name for path in out.iterdir() if path.name != "config.json"]
    assert [name for name in files if (out / name).read_bytes() != (again / name).read_bytes()] == []


def test_a_hugging_face_tokenizer_comes_along_byte_by_byte(tmp_path: Path, own_tokenizer: Path) -> None:
    words = ["tokenizer={kind: huggingface, path: " + str(own_tokenizer) + "}", f"run.directory={tmp_path / 'run'}"]
    recipe = load_recipe(TINY, words)
    prepare_run(recipe)
    kept = {path.name: path.read_bytes() for path in own_tokenizer.glob("*token*")}
    for path in own_tokenizer.iterdir():
        path.unlink()  # the run needs it no longer
    out = export(recipe, tmp_path / "run", tmp_path / "out")
    assert kept and all((out / name).read_bytes() == content for name, content in kept.items())
    assert not (out / "pytorch_model.bin").exists()
    read = HuggingFaceTokenizer(out)
    assert read.encode_prompt("one two") == [3, 5, 4, 6, 7]
    settings = json.loads((out / "generation_config.json").read_text())
    assert set(settings["eos_token_id"]) == {1, 2} and settings["temperature"] == 0.6


def test_a_tokenizer_that_is_gone_is_said_and_the_weights_are_kept(
    tmp_path: Path, own_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = export(load_recipe(TINY), tmp_path / "no run", tmp_path / "model")
    words = ["tokenizer={kind: huggingface, path: " + str(own_tokenizer) + "}", "trainer.ranks=1"]
    assert main(["convert", str(source), str(tmp_path / "cut"), str(TINY), *words]) == 0
    for path in own_tokenizer.iterdir():
        path.unlink()
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "cut"), str(tmp_path / "back")]) == 0
    assert f"but no tokenizer ({own_tokenizer} has no tokenizer_config.json): put its files there" in " ".join(
        capsys.readouterr().out.split()
    )
    assert (tmp_path / "back" / "model-00001.safetensors").is_file()


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"byte_fallback": True},
        {"split_digits": True},
    ],
    ids=str,
)
def test_every_kind_of_sentencepiece_model_is_read_alike(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 50),
        model_writer=written, model_type=kind, vocab_size=90 + 256 * ("byte_fallback" in options),
        hard_vocab_limit=False, user_defined_symbols=["<q>", "<a>"], num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    (tmp_path / "m.model").write_bytes(written.getvalue())
    recipe = load_recipe(TINY, [f"tokenizer.path={tmp_path / 'm.model'}"])
    (tmp_path / "out").mkdir()
    write_tokenizer(recipe, tmp_path / "no run", tmp_path / "out")
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer(recipe.tokenizer, None)
    for question in ("the cat sat", "What is  3+45?", " on 12 mats"):
        chat = [{"role": "user", "content": question}]
        assert theirs.apply_chat_template(chat, return_dict=False) == ours.encode_prompt(question)


def test_a_model_that_would_be_read_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gspo_megatron.data import sentencepiece_files

    build = sentencepiece_files._build

    def without_normalizer(proto: Any) -> Any:
        fast = build(proto)
        fast.normalizer = None
        return fast

    monkeypatch.setattr(sentencepiece_files, "_build", without_normalizer)
    with pytest.raises(RecipeError, match=r"tokenizer-not-written.* reads '.*' as \[3, "):
        write_tokenizer(load_recipe(TINY), tmp_path / "no run", tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_files_of_weights_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    weights.write_tensors({"one": torch.zeros(1)}, tmp_path / "one.safetensors")
    assert (tmp_path / "one.safetensors").stat().st_mode == (tmp_path / "a file").stat().st_mode
