"""The log of a run and what is made of it."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.cli import main
from gspo_megatron.report.page import read_plotly, write_report
from gspo_megatron.report.page_data import read_run
from gspo_megatron.report.plots import curve, describe_evaluations, read_rows, write_plot
from gspo_megatron.run_dir import RunDir
from gspo_megatron.run_log import RunLog
from gspo_megatron.types import Finding

PLOTLY = read_plotly()

EVALUATION = {
    "accuracy": 0.25, "mean_reward": 0.25, "mean_length": 9.0, "unscored": 0,
    "problems": 16, "answers": 1, "temperature": 0.0,
    "examples": [{"question": "Calculate 1 + 2.", "answer_text": "<b>3</b>", "reward": 1.0}],
}  # fmt: skip
ROW = {
    "reward_mean": 0.5, "answer_length": 10.0, "clip_fraction_sequences": 0.1, "grad_norm": 0.7,
    "clip_fraction_sequences/minibatch_0": 0.0, "clip_fraction_sequences/minibatch_1": 0.2,
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "objective.txt").write_text("gspo: sequence ratio, clip\n")
    with RunLog(tmp_path, owns_terminal=True) as log:
        log.evaluation(0, EVALUATION)
        for step in (1, 2):
            with log.step(step):
                log.add(ROW)
                with log.time("train"):
                    pass
        log.evaluation(2, {**EVALUATION, "accuracy": 0.75})
    return tmp_path


def held_by(page: str) -> dict[str, Any]:
    """The data of a page."""
    return json.loads(page.partition('id="run">')[2].partition("</script>")[0])


def test_rows_hold_metrics_and_seconds(run_dir: Path) -> None:
    rows = read_rows(run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["eval/accuracy"] == 0.25
    assert {"seconds/train", "seconds/step"} <= rows[1].keys()
    assert curve(rows, "reward_mean") == ([1, 2], [0.5, 0.5])
    assert list((run_dir / "tensorboard").iterdir())


def test_a_rank_without_the_terminal_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, owns_terminal=False) as log, log.step(1):
        log.add(ROW)
        log.say("nothing")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_a_run_that_goes_on_forgets_the_later_rows(run_dir: Path) -> None:
    RunLog(run_dir, owns_terminal=True).rewind(1)
    assert [row["step"] for row in read_rows(run_dir)] == [0, 1]


def test_the_page_loads_nothing_and_holds_texts_as_data(run_dir: Path) -> None:
    assert write_plot(run_dir).stat().st_size > 10_000
    page = write_report(run_dir).read_text()
    assert "\\u003cb>3\\u003c/b>" in page and "<b>3</b>" not in page
    assert "default-src 'none'" in page and "connect-src 'none'" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page.replace(PLOTLY, ""))


@pytest.mark.parametrize(
    ("evaluations", "said"),
    [
        ([{}], "greedy"),
        ([{"temperature": 0.7}], "at temperature 0.7"),
        ([{"temperature": 0.7, "answers": 4}], "mean of 4 responses at temperature 0.7"),
        ([{}, {}, {"temperature": 1.0}], "greedy, then at temperature 1"),
    ],
)
def test_the_page_says_how_the_evaluations_sampled(
    tmp_path: Path, evaluations: list[dict[str, float]], said: str
) -> None:
    with RunLog(tmp_path, owns_terminal=True) as log:
        log.evaluation(0, EVALUATION | evaluations[0])
        for step, changed in enumerate(evaluations[1:], 1):
            with log.step(step):
                log.add(ROW)
                log.evaluation(step, EVALUATION | changed)
    assert describe_evaluations(read_rows(tmp_path)) == said
    write_plot(tmp_path)
    last = said.split("then ")[-1]
    assert read_run(tmp_path)["evaluated"]["about"] == f"step {len(evaluations) - 1}, {last}"


def test_a_run_that_recorded_nothing_has_a_page(tmp_path: Path) -> None:
    assert write_plot(tmp_path).is_file() and write_report(tmp_path).is_file()


def test_rows_of_an_older_run_claim_nothing() -> None:
    assert describe_evaluations([{"step": 0, "eval/accuracy": 0.5}]) == ""


def test_texts_keep_their_lines_and_every_character(run_dir: Path) -> None:
    said = {"question": "a\n  b", "answer_text": "x" * 5000 + "\nline & <i>\ud800</script>$\\\\frac12$", "reward": 0.5}
    (run_dir / "examples.json").write_text(json.dumps([said]))
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert held_by(page)["evaluated"]["items"] == [said]


def test_the_page_is_of_a_run_that_goes_on(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward_m')
    assert read_run(run_dir)["steps"]["total"] == 3


def test_what_is_not_finite_is_left_out(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "grad_norm": NaN, "reward_mean": 0.5, "loss": Infinity}\n')
    found = held_by(write_report(run_dir).read_text())
    assert found["series"]["grad_norm"]["x"] == [1, 2] and found["series"]["reward_mean"]["x"] == [1, 2, 3]
    assert "loss" not in found["series"] and found["steps"]["rows"][-1][6] is None


def test_each_warning_is_kept_with_its_first_step(tmp_path: Path) -> None:
    finding = Finding("mostly-clipped", "warning", "objective.clip_low", "60% are clipped", "lower optimizer.lr")
    error = Finding("nonfinite-logprobs", "error", "objective", "3 tokens", "run check_values")
    with RunLog(tmp_path, owns_terminal=True) as log:
        assert read_run(tmp_path)["health"] == []
        for step in (1, 2, 3):
            with log.step(step):
                log.add(ROW)
                if step > 1:
                    log.warn(finding)
        log.warn(error)
    assert [(one["code"], one["first"], one["last"], one["count"]) for one in read_run(tmp_path)["health"]] == [
        ("nonfinite-logprobs", 3, 3, 1), ("mostly-clipped", 2, 3, 2)
    ]  # fmt: skip
    RunLog(tmp_path, owns_terminal=True).rewind(2)
    assert [(one["code"], one["count"]) for one in read_run(tmp_path)["health"]] == [("mostly-clipped", 1)]


def test_a_run_of_an_earlier_version_does_not_claim_to_be_healthy(run_dir: Path) -> None:
    (run_dir / "warnings.jsonl").unlink()
    found = read_run(run_dir)
    assert found["health"] is None and any("no list of its warnings" in note for note in found["notes"])


def test_rewards_outside_0_to_1_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    limits: list[tuple[float, float]] = []
    monkeypatch.setattr(pyplot, "close", lambda figure: limits.append(figure.axes[0].get_ylim()))
    with RunLog(tmp_path, owns_terminal=True) as log, log.step(1):
        log.add(ROW | {"reward_mean": -0.75})
    write_plot(tmp_path)
    assert limits == [(-0.75, 1.0)]


def test_gspo_report_refuses_a_directory_without_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err


def test_a_refused_recipe_exits_2_with_a_finding_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipes/tiny_moe.yaml", "trainer.a=1", "batch.updates=5"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_examples_are_json(run_dir: Path) -> None:
    assert json.loads((run_dir / "examples.json").read_text())[0]["reward"] == 1.0


def test_each_start_records_versions_and_git(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gspo_megatron.report import provenance

    checkout = tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.setattr(provenance, "CHECKOUT", checkout)
    assert provenance.describe_code()["git"] == ""  # no checkout of ours, whatever lies above
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=trunk")
    (checkout / "file").write_text("1")
    for words in (("init", "-q"), ("add", "file"), ("commit", "-qm", "one")):
        subprocess.run(("git", *author, "-C", str(checkout), *words), check=True)
    assert provenance.describe_code()["git"].endswith(" on trunk, no file changed")
    (checkout / "file").write_text("2")
    run = RunDir(run_dir)
    provenance.record_start(run)
    provenance.record_start(run)
    with run.provenance.open("a") as file:
        file.write('{"at": "20')
    facts = dict(read_run(run_dir)["facts"])
    assert "on trunk, 1 file changed" in facts["Code"] and "2 times" in facts["Started"]
    assert f"torch {version('torch')}" in facts["Packages"]
