"""What `gspo train` says to type: the words lead back into the run."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from gspo_megatron.cli import main
from gspo_megatron.commands import train_run
from gspo_megatron.commands.resume_command import extend_command, resume_command
from gspo_megatron.commands.train_run import prepare_run, stays_finished
from gspo_megatron.config import Recipe
from gspo_megatron.models import load_recipe
from gspo_megatron.run_dir import RunDir
from tests.checkpoints import write_checkpoint
from tests.places import ROOT

TINY = ROOT / "recipes" / "tiny_moe.yaml"


def recipe(run: Path, steps: int) -> Recipe:
    return load_recipe(TINY, [f"run.directory={run}", f"trainer.max_steps={steps}"])


@pytest.mark.parametrize("program", ["/venv/bin/gspo", "/venv/lib/gspo_megatron/cli.py", "local.sh"])
def test_the_command_names_the_run_once_and_keeps_what_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.delenv("GSPO_ROLLOUT_PYTHON", raising=False)
    if program == "local.sh":
        monkeypatch.setenv("GSPO_ROLLOUT_PYTHON", sys.executable)
    start = {
        "local.sh": [str(ROOT / "launch" / "local.sh")],
        "/venv/bin/gspo": [program, "train"],
    }.get(program, [sys.executable, "-m", "gspo_megatron.cli", "train"])
    typed = ["reward.answer_marker=#### {}", "run.directory=one", "trainer.max_steps=4", "run.directory=two"]
    words = shlex.split(resume_command(Path("my recipe.yaml"), typed, tmp_path / "a run"))
    assert words == [*start, "my recipe.yaml", typed[0], typed[2], f"run.directory={tmp_path / 'a run'}"]
    words = shlex.split(extend_command(Path("r.yaml"), typed, tmp_path, 4))
    assert words == [*start, "r.yaml", typed[0], "trainer.max_steps=8", f"run.directory={tmp_path}"]


def test_a_finished_run_goes_on_with_more_steps_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_run(recipe(tmp_path, 4))
    assert not stays_finished(recipe(tmp_path, 8))
    RunDir(tmp_path).done.touch()
    write_checkpoint(RunDir(tmp_path).checkpoint(4).path)
    words = ["train", str(TINY), "placement.gpu=cpu", f"run.directory={tmp_path}"]
    for steps in (4, 3):
        assert main([*words, f"trainer.max_steps={steps}"]) == 0
        assert "DONE); to train further: " in (said := capsys.readouterr().out) and f"max_steps={2 * steps}" in said
        assert RunDir(tmp_path).done.is_file()
    monkeypatch.setattr(train_run, "run_roles", lambda *_, **__: 0)  # in place of the processes of a run
    assert main([*words, "trainer.max_steps=8"]) == 0
    assert "a finished run of 4 steps; it goes on after step 4, to step 8" in capsys.readouterr().out
    assert not RunDir(tmp_path).done.is_file()


def test_a_finished_run_without_a_checkpoint_is_refused_and_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_run(recipe(tmp_path, 4))
    RunDir(tmp_path).done.touch()
    words = ["train", str(TINY), "placement.gpu=cpu", f"run.directory={tmp_path}", "trainer.max_steps=8"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "error [no-checkpoint] trainer.max_steps: 8 extends the finished run of 4 steps" in said
    assert "final" not in said, "there is none to start from"
    (write_checkpoint(RunDir(tmp_path).checkpoint(4).path) / "state.json").write_text("")
    assert main(words) == 2
    assert "error [checkpoint-damaged] run.directory: step_000004 cannot be resumed from" in capsys.readouterr().err
    assert RunDir(tmp_path).done.is_file()
