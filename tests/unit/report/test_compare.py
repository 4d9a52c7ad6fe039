"""`gspo compare`: groups of seeds, differences, intervals, the page."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.cli import main
from gspo_megatron.config import RecipeError, save_resolved
from gspo_megatron.models import load_recipe
from gspo_megatron.report.intervals import of_difference, over_seeds
from gspo_megatron.report.overlay_page import compare
from gspo_megatron.report.run_groups import differing_keys, group_runs, last_common_step, outcomes, read_runs
from gspo_megatron.run_dir import RunDir
from tests.places import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def make_run(directory: Path, seed: int, accuracy: float, *overrides: str, steps: int = 10) -> Path:
    run = RunDir(directory)
    run.path.mkdir(parents=True)
    words = (f"run.seed={seed}", f"run.name=n{seed}", f"run.directory={directory}", *overrides)
    save_resolved(load_recipe(ROOT / "recipes" / "tiny_moe.yaml", words), run.recipe)
    rows: list[dict[str, Any]] = [
        {"step": step, "reward_mean": step / 10, "grad_norm": 1.0, "seconds/step": 2.0, "rollout_tokens": 100}
        for step in range(1, steps + 1)
    ]
    rows[-1]["eval/accuracy"] = accuracy
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three seeds of a recipe, and two of another learning rate that went on longer."""
    found = [make_run(tmp_path / "a" / str(seed), seed, 0.5 + seed / 10) for seed in range(3)]
    faster = [
        make_run(tmp_path / "b" / str(seed), seed, 0.9, "optimizer.lr=0.002", "batch.updates=2", steps=12)
        for seed in range(2)
    ]
    return found + faster


def test_seeds_of_a_recipe_are_one_group(runs: list[Path]) -> None:
    found = read_runs(runs)
    assert differing_keys(found) == ["batch.updates", "optimizer.lr"]
    groups = group_runs(found)
    assert [(group.name, [run.seed for run in group.runs]) for group in groups] == [("A", [0, 1, 2]), ("B", [0, 1])]
    assert groups[1].about == "batch.updates=2, optimizer.lr=0.002"
    assert [run.name for run in found] == ["a/0", "a/1", "a/2", "b/0", "b/1"]


def test_outcomes_are_of_the_last_common_step(runs: list[Path]) -> None:
    found = read_runs(runs)
    assert last_common_step(found) == 10
    groups = group_runs(found)
    accuracy = outcomes(groups, "eval/accuracy", 10)
    assert [one.group for one in accuracy] == ["A"]  # B was evaluated at step 12 alone
    assert accuracy[0].mean == pytest.approx(0.6) and accuracy[0].difference is None
    low, high = accuracy[0].interval or (0, 0)
    assert (low, high) == pytest.approx((0.6 - 4.3027 * 0.1 / math.sqrt(3), 0.6 + 4.3027 * 0.1 / math.sqrt(3)))
    first, second = outcomes(groups, "reward_mean", 10)
    assert first.values == (1.0,) * 3 and second.values == (1.0,) * 2 and second.difference == 0
    assert second.difference_interval == (0, 0)


def test_intervals_over_seeds_of_known_cases() -> None:
    assert over_seeds([1.0]) is None and of_difference([1.0], [1.0, 2.0]) is None
    # Welch (1947): means 2 and 5, variances 1 and 4, 3 and 4 values; 4.7 degrees of freedom, counted as 4.
    found = of_difference([1.0, 2.0, 3.0], [3.0, 4.0, 6.0, 7.0])
    spread = 2.7764 * math.sqrt(1 / 3 + 10 / 3 / 4)
    assert found == pytest.approx((-3 - spread, -3 + spread))


def test_the_command_writes_its_page_and_no_other(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, words = tmp_path / "page.html", [str(run) for run in runs]
    assert main(["compare", *words, "--out", str(page)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "optimizer.lr" in said and "Outcomes at step 10" in said and "a/2 (seed 2)" in said
    assert main(["compare", *words, "--out", str(page)]) == 0  # over its own
    other = tmp_path / "other.html"
    other.write_text("mine")
    assert main(["compare", *words, "--out", str(other)]) == 2 and other.read_text() == "mine"
    assert "is no page of gspo" in capsys.readouterr().err


def test_bad_input_is_a_sentence(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs[0])]) == 2 and main(["compare", str(runs[0]), str(runs[0])]) == 2
    assert "two directories" in capsys.readouterr().err
    assert main(["compare", str(runs[0]), str(tmp_path)]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
    (runs[1] / "metrics.jsonl").write_text("no row\n")
    with pytest.raises(RecipeError, match="line 1 is no row"):
        read_runs(runs)


def test_every_curve_is_on_the_page_in_the_colour_of_its_group(runs: list[Path]) -> None:
    data = compare(read_runs(runs))
    reward = next(p for one in data["figures"] for p in one["panels"] if p["title"] == "Reward")
    lines = [trace for trace in reward["traces"] if trace["kind"] == "line"]
    assert [(trace["series"], trace["colour"], trace["first"]) for trace in lines] == [
        ("a/0: reward_mean", 0, True), ("a/1: reward_mean", 0, False), ("a/2: reward_mean", 0, False),
        ("b/0: reward_mean", 1, True), ("b/1: reward_mean", 1, False),
    ]  # fmt: skip
    assert data["series"]["b/1: reward_mean"]["x"] == list(range(1, 13))
    assert "a/1: 0.1 at step 1, 1 at step 10" in reward["text"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which draws the page")
def test_the_comparison_in_a_browser(runs: list[Path], tmp_path: Path) -> None:
    assert CHROMIUM is not None
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "--out", str(page)]) == 0
    words = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--window-size=1200,5000")
    done = subprocess.run(
        (CHROMIUM, *words, "--enable-logging=stderr", "--dump-dom", page.as_uri()),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "Uncaught" not in done.stderr and "Refused" not in done.stderr, done.stderr[-2000:]
    assert "<td>batch.updates=2, optimizer.lr=0.002</td>" in done.stdout and 'class="main-svg"' in done.stdout
