"""`gspo convert` both ways, bit for bit, in every kind of layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gspo_megatron.cli import main
from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import Piece, hf_shapes
from gspo_megatron.own_directory import MARK
from gspo_megatron.policy import weights

LAYOUTS = [
    ["trainer.ranks=4", "trainer.tensor_parallel=2", "trainer.pipeline_parallel=2", "trainer.expert_parallel=2"],
    ["trainer.ranks=4", "trainer.pipeline_parallel=2", "trainer.virtual_pipeline=2", "trainer.context_parallel=2"],
    ["trainer.ranks=4", "trainer.tensor_parallel=4", "trainer.expert_tensor_parallel=2"],
]
RECIPE = "recipes/tiny_moe.yaml"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(weights, "SHARD_BYTES", 1_000_000)
    arch = load_recipe(Path(RECIPE)).arch
    read = weights.random_pieces(arch, 1)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in hf_shapes(arch).items():
            yield name, read(Piece(name, (0, shape[0]), (0, shape[1]) if len(shape) == 2 else None, (0, shape[0])))

    weights.save_hf(tensors(), arch.to_hugging_face("float32"), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_there_and_back_gives_the_same_files(source: Path, tmp_path: Path, layout: list[str]) -> None:
    assert main(["convert", str(source), str(tmp_path / "cut"), RECIPE, *layout]) == 0
    assert len(list((tmp_path / "cut").glob("rank_*.safetensors"))) == 4
    assert main(["convert", str(tmp_path / "cut"), str(tmp_path / "back")]) == 0
    files = sorted(path.name for path in source.iterdir() if path.name != MARK)
    assert {path.name for path in (tmp_path / "back").iterdir()} - {*files} == {MARK, *TOKENIZER} and len(files) > 3
    assert all((source / name).read_bytes() == (tmp_path / "back" / name).read_bytes() for name in files)


def test_what_cannot_be_converted_is_a_sentence(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), str(tmp_path / "cut")]) == 2
    assert "name the recipe" in capsys.readouterr().err
    smaller = "model.architecture.num_experts=4"
    assert main(["convert", str(source), str(tmp_path / "cut"), RECIPE, "trainer.ranks=2", smaller]) == 2
    assert "mlp.experts.7.up_proj.weight in model-" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()


def test_a_run_of_bfloat16_comes_back_in_bfloat16(source: Path, tmp_path: Path) -> None:
    wanted = ["model.dtype=bfloat16", "trainer.ranks=2"]
    assert main(["convert", str(source), str(tmp_path / "cut"), RECIPE, *wanted]) == 0
    assert main(["convert", str(tmp_path / "cut"), str(tmp_path / "back")]) == 0
    arch = load_recipe(Path(RECIPE)).arch
    name, shape = "model.layers.0.mlp.gate.weight", (8, 128)
    piece = Piece(name, (0, shape[0]), (0, shape[1]), (0, shape[0]))
    ours, theirs = (weights.safetensors_pieces(place, arch)(piece) for place in (source, tmp_path / "back"))
    assert theirs.dtype is torch.bfloat16 and torch.equal(ours.bfloat16(), theirs)


def test_nothing_of_somebody_is_replaced(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut, back, wanted = tmp_path / "cut", tmp_path / "back", [RECIPE, "trainer.ranks=1"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    assert main(["convert", str(source), str(tmp_path / "thesis"), *wanted]) == 2
    assert "error [directory-not-ours] OUT: " in capsys.readouterr().err
    for _ in range(2):  # an older conversion is replaced
        assert main(["convert", str(source), str(cut), *wanted]) == 0
        assert main(["convert", str(cut), str(back)]) == 0
    capsys.readouterr()
    (back / "README.md").write_text("mine")
    for place in (tmp_path / "thesis", back, cut, cut / "hf", tmp_path):
        assert main(["convert", str(cut), str(place)]) == 2
        said = capsys.readouterr().err
        assert str(place) in said and said.count("\n") == 1
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    assert (back / "README.md").read_text() == "mine" and not (cut / "hf").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "cut", "model", "thesis"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("state.json", b""), ("state.json", b"{}"), ("state.json", b'{"layout": {"ranks": 1}}'),
     ("rank_00000.safetensors", b""), ("rank_00000.safetensors", b"\xff" * 64), ("rank_00000.safetensors", None)],
)  # fmt: skip
def test_a_damaged_checkpoint_is_a_sentence(
    source: Path, tmp_path: Path, name: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    assert main(["convert", str(source), str(cut), RECIPE, "trainer.ranks=1"]) == 0
    (cut / name).unlink()
    if content is not None:
        (cut / name).write_bytes(content)
    capsys.readouterr()
    assert main(["convert", str(cut), str(tmp_path / "back")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{cut} is damaged (") and said.count("\n") == 1
    assert not (tmp_path / "back").exists()
