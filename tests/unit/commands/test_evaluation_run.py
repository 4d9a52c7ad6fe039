"""`gspo eval`: which weights a path names, the recipe with their model in it, the directory that it makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from gspo_megatron.cli import main
from gspo_megatron.cluster import local_backend
from gspo_megatron.cluster.attempts import STATE_KEYS
from gspo_megatron.cluster.local_backend import plan_evaluation
from gspo_megatron.commands import evaluation_run
from gspo_megatron.commands.evaluated_weights import find_weights, read_evaluation_recipe
from gspo_megatron.config import save_resolved
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.models import load_recipe, load_resolved
from gspo_megatron.models.hf_table import Piece, hf_shapes
from gspo_megatron.parallel import Layout
from gspo_megatron.policy import weights
from gspo_megatron.run_dir import CheckpointDir, RunDir
from tests.places import ROOT

TINY = ROOT / "recipes" / "tiny_moe.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with other sizes than the recipe's."""
    arch = load_recipe(TINY, ["model.architecture.num_hidden_layers=1", "model.architecture.num_experts=4"]).arch
    read = weights.random_pieces(arch, 1)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in hf_shapes(arch).items():
            yield name, read(Piece(name, (0, shape[0]), (0, shape[1]) if len(shape) == 2 else None, (0, shape[0])))

    directory = tmp_path_factory.mktemp("weights") / "model"
    weights.save_hf(tensors(), arch.to_hugging_face("float32"), directory)
    return directory


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The roles that the command would have started."""
    found: list[list[str]] = []

    def run_roles(roles: list[local_backend.Role], logs: Path, leader: str) -> int:
        found.append([role.name for role in roles] + [leader])
        return 0

    monkeypatch.setattr(evaluation_run, "run_roles", run_roles)
    return found


def checkpoint(run: RunDir, step: int, *overrides: str) -> CheckpointDir:
    made = run.checkpoint(step)
    made.path.mkdir(parents=True)
    save_resolved(load_recipe(TINY, overrides), made.recipe)
    state = dict.fromkeys(STATE_KEYS, 0) | {"step": step, "files": {made.recipe.name: made.recipe.stat().st_size}}
    made.state.write_text(json.dumps(state))
    made.marker.touch()
    return made


def test_a_run_directory_names_its_newest_weights(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    save_resolved(load_recipe(TINY), run.recipe)
    with pytest.raises(RecipeError, match="is a run directory without a checkpoint that can be read"):
        find_weights(tmp_path)
    for step in (2, 10):
        checkpoint(run, step)
    (run.checkpoint(12).path).mkdir()  # never finished
    (run.checkpoints / "step_000011_best").mkdir()
    assert find_weights(tmp_path).path == run.checkpoint(10).path
    damaged = checkpoint(run, 13)
    damaged.state.write_text("")
    assert find_weights(tmp_path).path == run.checkpoint(10).path
    assert "step_000013 is passed over: state.json is damaged" in find_weights(tmp_path).passed_over[0]
    run.final.mkdir()
    (run.final / "config.json").touch()
    assert find_weights(tmp_path).path == run.checkpoint(10).path, "final/ is written before the run is done"
    run.done.touch()
    assert find_weights(tmp_path).path == run.final
    assert find_weights(run.checkpoint(2).path).is_checkpoint and not find_weights(run.final).is_checkpoint


def test_the_model_is_that_of_the_weights(model: Path, tmp_path: Path) -> None:
    recipe = read_evaluation_recipe(TINY, ["evaluation.answers=4"], find_weights(model))
    assert recipe.arch.num_experts == 4 and recipe.arch.num_hidden_layers == 1
    assert recipe.model.path == model and recipe.model.dtype == "float32" and recipe.evaluation.answers == 4
    made = checkpoint(RunDir(tmp_path), 3, "model.architecture.num_hidden_layers=2")
    recipe = read_evaluation_recipe(TINY, [], find_weights(made.path))
    assert recipe.arch.num_hidden_layers == 2 and recipe.model.path is None


@pytest.mark.parametrize("beside", [True, False])
def test_the_tokenizer_is_the_recipes_else_the_weights_else_of_the_recipes_model(
    model: Path, tmp_path: Path, beside: bool
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    named = TINY.read_text().replace("tokenizer: {kind: sentencepiece, path: tokenizers/arithmetic.model}", "")
    (tmp_path / "recipe.yaml").write_text(named.replace("  dtype: float32", f"  dtype: float32\n  path: {base}"))
    source = tmp_path / "model"
    source.symlink_to(model)
    tokenizer = model / "tokenizer_config.json"
    if beside:
        tokenizer.write_text("{}")
    try:
        recipe = read_evaluation_recipe(tmp_path / "recipe.yaml", [], find_weights(source))
        assert (recipe.tokenizer.path or recipe.model.path) == (source if beside else base)
        named = read_evaluation_recipe(tmp_path / "recipe.yaml", [f"tokenizer.path={tmp_path}"], find_weights(source))
        assert named.tokenizer.path == tmp_path
    finally:
        tokenizer.unlink(missing_ok=True)


def test_the_directory_holds_what_servers_and_controller_read(
    model: Path, tmp_path: Path, started: list[list[str]]
) -> None:
    out = tmp_path / "out"
    assert main(["eval", str(model), str(TINY), "--out", str(out), "evaluation.problems=8"]) == 0
    assert started == [["rollout-0", "controller", "evaluator", "evaluator"]]
    run = RunDir(out)
    assert load_resolved(run.recipe).evaluation.problems == 8
    assert json.loads(run.model_config.read_text())["num_experts"] == 4
    files = [file for file in run.model.iterdir() if file.name.endswith(".safetensors")]
    assert files and all(file.resolve().parent == model for file in files)
    assert run.weights_source.read_text() == f"{model}\n"


def test_a_cut_evaluation_is_done_again_and_a_finished_one_stays(
    model: Path, tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert main(["eval", str(model), str(TINY), "--out", str(out)]) == 0
    assert len(started) == 2 and len(list(RunDir(out).logs.iterdir())) == 2
    RunDir(out).evaluation.write_text("{}")
    assert main(["eval", str(model), str(TINY), "--out", str(out)]) == 2
    assert "holds a finished evaluation" in capsys.readouterr().err and len(started) == 2


def test_a_checkpoint_that_cannot_be_read_leaves_nothing(
    tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    made = checkpoint(RunDir(tmp_path / "run"), 3)
    made.state.write_text(json.dumps({"layout": asdict(Layout(1))}))
    assert main(["eval", str(made.path), str(TINY), "--out", str(tmp_path / "out")]) == 2
    assert "rank_00000.safetensors" in capsys.readouterr().err
    assert not started and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_servers_and_controller_know_that_no_update_comes(model: Path, tmp_path: Path) -> None:
    recipe = read_evaluation_recipe(TINY, ["rollout.servers=2"], find_weights(model))
    roles = {role.name: role for role in plan_evaluation(recipe, tmp_path)}
    assert list(roles) == ["rollout-0", "rollout-1", "controller", "evaluator"]
    assert ["--loaded" in role.command for role in roles.values()] == [True, True, True, False]
    assert [role.owns_terminal for role in roles.values()] == [False, False, False, True]
    assert not any(role.restarts for role in roles.values()), "a new process would not be asked"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["DIR/nothing", "TINY"], "holds no config.json, state.json or recipe.resolved.yaml"),
        (["MODEL", "TINY", "model.path=x"], "model.path: the weights of"),
        (["MODEL", "TINY", "model.architecture.num_experts=8"], "remove this override"),
        (["MODEL", "TINY", "evaluation.problems=600"], "600 problems are set, but data.held_out=512 are held out"),
        (["MODEL", "TINY", "tokenizer.path=DIR/x"], "tokenizer.path: DIR/x does not exist here"),
        (["MODEL", "TINY", "evaluation.problems=0"], "evaluation.problems: 0 problems are nothing to evaluate"),
        (
            ["MODEL", "TINY", "--out", "FULL"],
            "--out: FULL holds theirs, and nothing marks it as a directory of",
        ),
        (["MODEL", "TINY", "--out", "/proc/x"], "--out: /proc/x"),
        (["BROKEN", "TINY"], "BROKEN: neither model.safetensors.index.json nor model.safetensors is there"),
    ],
)
def test_a_refusal_leaves_nothing(
    words: list[str], sentence: str, model: Path, tmp_path: Path, started: list[list[str]],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    full, broken = tmp_path / "full", tmp_path / "broken"
    for directory in (full, broken):
        directory.mkdir()
    (full / "theirs").write_text("kept")
    (broken / "config.json").write_bytes((model / "config.json").read_bytes())
    places = {"DIR": tmp_path, "MODEL": model, "TINY": TINY, "FULL": full, "BROKEN": broken}

    def put_in(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    assert main(["eval", *map(put_in, words)]) == 2
    said = capsys.readouterr().err
    assert put_in(sentence) in said and not started
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "full"]
    assert [path.name for path in full.iterdir()] == ["theirs"]


def test_equal_answers_are_warned_of(
    model: Path, tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(model), str(TINY), "evaluation.answers=4", "--out", str(tmp_path / "out")]) == 0
    assert "warning [eval-equal-answers] evaluation.answers: 4 greedy responses" in capsys.readouterr().err
