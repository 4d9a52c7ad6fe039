"""One rule of what may change when a run goes on, for `gspo plan`, `gspo train` and a SLURM job."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gspo_megatron.cli import main
from gspo_megatron.commands.train_run import prepare_run
from gspo_megatron.config import Recipe, save_resolved
from gspo_megatron.config.agent_section import AgentSection
from gspo_megatron.config.engine_sections import VllmMap
from gspo_megatron.config.judge_section import JudgeSection
from gspo_megatron.config.long_responses import EnvironmentSection
from gspo_megatron.config.teacher_section import TeacherSection
from gspo_megatron.models import load_recipe
from gspo_megatron.plan.rules import data_files
from gspo_megatron.plan.rules.resume import MAY_CHANGE, MUST_STAY, findings, flatten
from gspo_megatron.run_dir import RunDir
from launch.lib.plan import load_for_job, say_findings
from tests.checkpoints import RANK_FILE, write_checkpoint
from tests.places import ROOT

TINY = ROOT / "recipes" / "tiny_moe.yaml"
CHANGES = ("objective.clip_low=0.001", "optimizer.lr=1e-5", "rollout.temperature=0.9", "rollout.max_answer_tokens=20",
           "batch.prompts=32", "run.seed=3", "trainer.aux_loss_coefficient=0.01", "data.held_out=100",
           "reward.answer_marker=A:", "tokenizer.path=/elsewhere.model")  # fmt: skip


def recipe(run: Path, *overrides: str) -> Recipe:
    return load_recipe(TINY, [f"run.directory={run}", *overrides])


@pytest.mark.parametrize("override", CHANGES)
def test_what_changes_the_algorithm_is_refused_by_key(tmp_path: Path, override: str) -> None:
    prepare_run(recipe(tmp_path))
    (found,) = findings(recipe(tmp_path, override))
    assert (found.code, found.severity, found.key) == ("resume-other-recipe", "error", override.partition("=")[0])
    assert f"in {tmp_path}, which this would resume" in found.message


def test_where_it_runs_and_how_long_may_change(tmp_path: Path) -> None:
    assert not list(findings(recipe(tmp_path)))
    prepare_run(recipe(tmp_path))
    assert not list(findings(recipe(tmp_path)))
    more = ("trainer.max_steps=99", "placement.nodes=2", "rollout.servers=2", "checkpoint.every=1")
    less = ("trainer.micro_batch_tokens=2048", "rollout.max_concurrency=64", "rollout.kv_cache_gib=0.5")
    assert not list(findings(recipe(tmp_path, *more, *less)))


def test_a_schedule_that_ends_elsewhere_is_said(tmp_path: Path) -> None:
    prepare_run(recipe(tmp_path, "optimizer.schedule=cosine"))
    (found,) = findings(recipe(tmp_path, "optimizer.schedule=cosine", "trainer.max_steps=60"))
    assert (found.code, found.severity, found.key) == ("resume-other-schedule", "warning", "trainer.max_steps")


@pytest.mark.parametrize("command", ["plan", "train"])
def test_every_command_keeps_the_rule(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_run(recipe(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([command, str(TINY), "placement.gpu=cpu", f"run.directory={tmp_path}", "optimizer.lr=1e-5"]) == 2
    said = capsys.readouterr()
    assert "error [resume-other-recipe] optimizer.lr: 1e-05 here, 0.0001 in" in said.err + said.out
    with pytest.raises(ValueError, match="resume-other-recipe"):
        overrides = ["placement.gpu=cpu", f"run.directory={tmp_path}", "optimizer.lr=1e-5"]
        say_findings(load_for_job(TINY, overrides, "7", ["n1"], 0, ROOT), drawing=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_resolved_recipe_that_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    prepare_run(recipe(tmp_path))
    RunDir(tmp_path).recipe.write_text("run: [")
    assert [found.severity for found in findings(recipe(tmp_path))] == ["error"]


def test_every_name_in_the_lists_is_a_key(tmp_path: Path) -> None:
    passed_on = (f"rollout.vllm.{name}" for name in VllmMap.model_fields)
    keys = [*flatten(recipe(tmp_path).model_dump(mode="json")), *Recipe.model_fields, *passed_on]
    for name in (*MAY_CHANGE, *MUST_STAY):
        section, _, rest = name.partition(".")
        if rest and section in OPTIONAL:
            assert rest.removeprefix("judge.") in OPTIONAL[section].model_fields, name
            continue
        assert any(key.startswith(name) for key in keys), name


SCORE = "def score(problem, response):\n    return 1.0\n"
NAMES = {
    "tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}", "generation_config.json": '{"eos_token_id": 2}',
}  # fmt: skip


OPTIONAL = {"reward": JudgeSection, "environment": EnvironmentSection, "agent": AgentSection, "teacher": TeacherSection}
"""Sections that the tiny recipe has not."""


def own_recipe(place: Path, run: Path | None = None) -> Recipe:
    """A run whose tokenizer and reward lie in a directory of the user's, which is made."""
    if not place.exists():
        (place / "model").mkdir(parents=True)
        for name, text in NAMES.items():
            (place / "model" / name).write_text(text)
        (place / "my.py").write_text(SCORE)
    words = ("tokenizer.kind=huggingface", f"tokenizer.path={place / 'model'}", f"reward.name={place / 'my.py'}:score")
    return recipe(run or place / "run", *words)


@pytest.mark.parametrize(
    ("file", "text", "severity", "key"),
    [
        ("model/tokenizer.json", '{"a": 1}', "error", "tokenizer.path"),
        ("model/chat_template.jinja", "{{ messages }} ", "error", "tokenizer.path"),
        ("model/generation_config.json", '{"eos_token_id": [2, 3]}', "error", "tokenizer.path"),
        ("model/added_tokens.json", "{}", "error", "tokenizer.path"),
        ("model/additional_chat_templates/tools.jinja", "x", "error", "tokenizer.path"),
        ("my.py", SCORE.replace("1.0", "0.5"), "warning", "reward.name"),
        ("model/generation_config.json", '{"eos_token_id": 2, "temperature": 0.6}', None, ""),
        ("model/generation_config.json", '{"eos_token_id": [2]}', None, ""),
        ("model/tokenizer.json", '{ "model_max_length": 9 }', None, ""),
        ("model/notes.txt", "of the user's", None, ""),
        ("data.jsonl", "{}", None, ""),
    ],
)
def test_a_file_that_was_edited_between_two_attempts_is_found(
    tmp_path: Path, file: str, text: str, severity: str | None, key: str
) -> None:
    mine = tmp_path / "mine"
    prepare_run(own_recipe(mine))
    assert not list(findings(own_recipe(mine)))
    (mine / file).parent.mkdir(exist_ok=True)
    (mine / file).write_text(text)
    found = [(one.severity, one.key) for one in findings(own_recipe(mine))]
    assert found == ([] if severity is None else [(severity, key)])


def test_files_may_lie_elsewhere_if_they_are_the_same(tmp_path: Path) -> None:
    mine, copy = tmp_path / "mine", tmp_path / "copy"
    prepare_run(own_recipe(mine))
    assert not list(findings(own_recipe(copy, mine / "run")))
    (copy / "model" / "tokenizer.json").write_text("[]")
    (copy / "my.py").write_text("")
    found = [(one.severity, one.key) for one in findings(own_recipe(copy, mine / "run"))]
    assert found == [("warning", "reward.name"), ("error", "tokenizer.path")]
    RunDir(mine / "run").named_files.unlink()  # as a run of an earlier version
    found = [(one.code, one.severity, one.key) for one in findings(own_recipe(copy, mine / "run"))]
    assert found == [("resume-not-compared", "warning", key) for key in ("reward.name", "tokenizer.path")]
    (copy / "my.py").rename(copy / "your.py")
    other = own_recipe(copy, mine / "run")
    other = other.model_copy(update={"reward": other.reward.model_copy(update={"name": f"{copy / 'your.py'}:score"})})
    assert ("error", "reward.name") in [(one.severity, one.key) for one in findings(other)]


def test_a_run_that_goes_on_asks_for_no_demonstrations(tmp_path: Path) -> None:
    """They are read once: a folder that was moved since has no place for them any more."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "d.jsonl").write_text("{}")

    def named(place: str, *more: str) -> Recipe:
        path = tmp_path / place / "d.jsonl"
        own = f"cold_start={{path: {path}, steps: 9, batch_size: 4, lr: 0.1}}"
        return recipe(tmp_path / "run", "cold_start=null", own, *more)

    def keys(*more: str) -> list[str]:
        given = named("new", *more)
        return [one.key for one in (*findings(given), *data_files.findings(given, runs_here=True))]

    prepare_run(named("old"))
    assert keys() == ["cold_start.path", "cold_start.path"]
    checkpoint(tmp_path / "run", 1, named("old"))
    assert keys() == []
    reference = ("objective.kl=k3", "objective.kl_coefficient=0.01")
    assert "cold_start.path" in keys(*reference)


def test_another_function_of_the_same_file_is_another_reward(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    prepare_run(own_recipe(mine))
    other = own_recipe(mine)
    other = other.model_copy(update={"reward": other.reward.model_copy(update={"name": f"{other.reward.name}2"})})
    assert [(one.severity, one.key) for one in findings(other)] == [("error", "reward.name")]


def test_other_weights_of_the_same_size_are_another_model(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(ROOT / "tests" / "data" / "model", tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(name.encode() * 4096)
    prepare_run(recipe(tmp_path / "run", f"model.path={tmp_path / 'one'}"))
    assert not list(findings(recipe(tmp_path / "run", f"model.path={tmp_path / 'one'}")))
    assert [one.key for one in findings(recipe(tmp_path / "run", f"model.path={tmp_path / 'two'}"))] == ["model.path"]


def test_a_file_that_is_not_here_any_more_is_left_to_its_reader(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    prepare_run(own_recipe(mine))
    (mine / "my.py").unlink()
    assert not list(findings(own_recipe(mine)))


def checkpoint(run: Path, step: int, of: Recipe | None) -> Path:
    made = RunDir(run).checkpoint(step)
    write_checkpoint(made.path)
    if of is not None:
        save_resolved(of, made.recipe)
    return made.path


def test_the_recipe_of_the_newest_checkpoint_decides(tmp_path: Path) -> None:
    prepare_run(recipe(tmp_path))
    checkpoint(tmp_path, 1, recipe(tmp_path))
    assert not list(findings(recipe(tmp_path)))
    checkpoint(tmp_path, 2, recipe(tmp_path, "run.seed=7"))  # copied from another run
    assert [found.key for found in findings(recipe(tmp_path))] == ["run.seed"]
    RunDir(tmp_path).recipe.unlink()
    assert [found.key for found in findings(recipe(tmp_path))] == ["run.seed"]


def test_checkpoints_without_any_recipe_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, None)
    assert [found.code for found in findings(recipe(tmp_path))] == ["resume-without-recipe"]


def test_metrics_that_cannot_be_read_are_found_before_the_start(tmp_path: Path) -> None:
    prepare_run(recipe(tmp_path))
    RunDir(tmp_path).metrics.write_text("x{\n")
    assert [(one.code, one.severity) for one in findings(recipe(tmp_path))] == [("metrics-damaged", "error")]


def test_what_differs_in_a_tokenizer_is_named(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    prepare_run(own_recipe(mine))
    (mine / "model" / "chat_template.jinja").write_text("other")
    (mine / "model" / "generation_config.json").write_text('{"eos_token_id": 7}')
    (found,) = findings(own_recipe(mine))
    assert found.message == "not what the run began with: chat_template.jinja, stop ids"


def test_weights_count_only_where_they_are_read_again(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests" / "data" / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    words = ("objective.kl=k3", "objective.kl_coefficient=0.01")
    for run, more in (("plain", ()), ("reference", words)):
        weights.write_bytes(b"one" * 4096)
        given = (f"model.path={tmp_path / 'model'}", *more)
        prepare_run(recipe(tmp_path / run, *given))
        weights.write_bytes(b"two" * 4096)
        assert [one.key for one in findings(recipe(tmp_path / run, *given))] == ["model.path"]
        checkpoint(tmp_path / run, 1, recipe(tmp_path / run, *given))
        assert [one.key for one in findings(recipe(tmp_path / run, *given))] == (["model.path"] if more else [])


def test_a_checkpoint_that_is_damaged_is_found_before_the_start(tmp_path: Path) -> None:
    prepare_run(recipe(tmp_path))
    checkpoint(tmp_path, 1, recipe(tmp_path))
    (checkpoint(tmp_path, 2, recipe(tmp_path)) / RANK_FILE).write_bytes(b"")
    (found,) = findings(recipe(tmp_path))
    assert (found.code, found.severity) == ("checkpoint-damaged", "warning")
    assert "step_000002 cannot be resumed from: rank_00000.safetensors has 0 bytes" in found.message
    (RunDir(tmp_path).checkpoint(1).path / "state.json").write_text("{")
    assert [one.severity for one in findings(recipe(tmp_path))] == ["error", "error"]


def test_a_run_that_differs_in_many_keys_is_one_finding(tmp_path: Path) -> None:
    prepare_run(recipe(tmp_path))
    (found,) = findings(recipe(tmp_path, *CHANGES[:-1]))
    assert found.key == "run.directory" and "is of another run: 9 keys differ, batch.prompts, " in found.message


def test_a_package_of_the_user_s_own_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scores").mkdir()
    (tmp_path / "my_scores" / "__init__.py").write_text("")
    (tmp_path / "my_scores" / "plain.py").write_text(SCORE)
    monkeypatch.syspath_prepend(tmp_path)
    named = (tmp_path / "run", "reward.name=my_scores.plain:score")
    prepare_run(recipe(*named))
    assert not list(findings(recipe(*named)))
    (tmp_path / "my_scores" / "plain.py").write_text(SCORE.replace("1.0", "0.5"))
    assert [(one.code, one.key) for one in findings(recipe(*named))] == [("resume-other-code", "reward.name")]
