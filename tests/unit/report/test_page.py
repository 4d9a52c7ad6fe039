"""The log of a run and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo_megatron.cli import main
from gspo_megatron.report.page import write_report
from gspo_megatron.report.plots import curve, describe_evaluations, read_rows, write_expert_plot, write_plot
from gspo_megatron.run_log import RunLog

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


def test_report_is_one_page_with_the_plot_and_escaped_answers(run_dir: Path) -> None:
    assert write_plot(run_dir).stat().st_size > 10_000
    page = write_report(run_dir).read_text()
    assert "data:image/png;base64," in page and "&lt;b&gt;3&lt;/b&gt;" in page and "<b>3</b>" not in page


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
    assert f"last evaluation (step {len(evaluations) - 1}, {last})" in write_report(tmp_path).read_text()


def test_a_run_that_recorded_nothing_has_a_page(tmp_path: Path) -> None:
    assert write_plot(tmp_path).is_file() and write_report(tmp_path).is_file()


def test_rows_of_an_older_run_claim_nothing() -> None:
    assert describe_evaluations([{"step": 0, "eval/accuracy": 0.5}]) == ""


def test_texts_keep_their_lines_and_every_character(run_dir: Path) -> None:
    said = {"question": "a\n  b", "answer_text": "x" * 5000 + "\nline & <i>\ud800", "reward": 0.5}
    (run_dir / "examples.json").write_text(json.dumps([said]))
    write_plot(run_dir)
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert '<p class="said">a\n  b</p>' in page and "\nline &amp; &lt;i&gt;?</p>" in page


def test_the_page_fits_a_narrow_and_a_dark_screen(run_dir: Path) -> None:
    write_plot(run_dir)
    page = write_report(run_dir).read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page and '<div class="scroll"><table>' in page


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


def test_the_experts_are_drawn_layer_by_layer_where_there_are_any(run_dir: Path) -> None:
    assert write_expert_plot(run_dir) is None
    changed = {
        f"experts/{name}/layer_{layer}": 0.1 * layer
        for name in ("probe_changed", "load_max_over_mean")
        for layer in (0, 1)
    }
    metrics = run_dir / "metrics.jsonl"
    rows = [json.loads(line) | changed | {"experts/probe_changed": 0.1} for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_plot(run_dir)
    assert "changed expert choices" in write_report(run_dir).read_text()
