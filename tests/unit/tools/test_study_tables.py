"""The study's tables: intervals by hand, what is missing is said, and the README is that of the kept summaries."""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import re
import sys
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from tests.places import ROOT
from tools.study_figures import draw
from tools.study_grid import Grid, read_grid
from tools.study_statistics import Estimate, bootstrap, contrast, estimate
from tools.study_summary import outcome, summarize
from tools.study_tables import (
    ALTERNATIVES,
    CLAIMS,
    FIGURES,
    README,
    Claim,
    Kept,
    blocks,
    drawn,
    fill,
    read_kept,
    verdict,
    write_estimate,
)

CASES = int(os.environ.get("GSPO_FUZZ", "1000")) // 10


@pytest.fixture(scope="module")
def grid() -> Grid:
    return read_grid()


def kept_of(grid: Grid, share: float, seed: int = 0) -> Kept:
    """A grid of which a share of the cells has invented summaries."""
    draw = random.Random(seed)
    cells = tuple(grid.cells())
    summaries = {}
    for cell in cells:
        if draw.random() < share:
            rows: list[dict[str, Any]] = [{"step": 0, "eval/accuracy": 0.3}]
            rows += [
                {
                    "step": step, "eval/accuracy": draw.random(), "reward_mean": draw.random(), "trained_tokens": 10.0,
                    "clip_fraction_tokens": draw.random() / 9, "grad_norm": draw.random(),
                    "experts/probe_changed": draw.random() / 99,
                }
                for step in (5, 10, 15)
            ]  # fmt: skip
            facts = {"cell": cell.name, "package": "0a1b2c", "date": "2026-11-30", "hardware": "2 cores"}
            summaries[cell.name] = facts | {"processor_seconds": 100.0} | summarize(rows, grid.collapse)
    return Kept(grid, cells, summaries)


def test_an_interval_is_that_of_all_resamples() -> None:
    values = (0.2, 0.5, 0.9, 0.4)
    means = sorted(fmean(values[at] for at in places) for places in itertools.product(range(4), repeat=4))
    assert len(means) == 256
    assert bootstrap(values) == pytest.approx((means[6], means[-7]))
    assert bootstrap((0.1, 0.4, 0.7)) == pytest.approx((0.1, 0.7))
    assert bootstrap((0.4,)) is None and bootstrap(()) is None


def test_intervals_hold_the_mean_move_with_the_values_and_shrink_with_their_spread() -> None:
    draw = random.Random(0)
    for _ in range(CASES):
        values = [draw.gauss(0, 1) for _ in range(draw.randrange(2, 6))]
        low, high = bootstrap(values) or (0.0, 0.0)
        assert min(values) - 1e-12 <= low <= fmean(values) <= high <= max(values) + 1e-12
        shift, scale = draw.gauss(0, 3), draw.uniform(0.1, 4)
        assert bootstrap([scale * value + shift for value in values]) == pytest.approx(
            (scale * low + shift, scale * high + shift)
        )
        assert bootstrap(draw.sample(values, len(values))) == pytest.approx((low, high))


def test_many_seeds_are_drawn_and_agree_with_the_normal_interval() -> None:
    draw = random.Random(1)
    values = [draw.gauss(0, 1) for _ in range(40)]
    low, high = bootstrap(values) or (0.0, 0.0)
    assert high - low == pytest.approx(2 * 1.96 / 40**0.5, rel=0.2)


def test_a_contrast_is_formed_for_each_seed_that_has_all_of_it() -> None:
    table = {("a", "x", 0): 0.5, ("b", "x", 0): 0.2, ("a", "x", 1): 0.9, ("b", "x", 1): 0.5, ("a", "x", 2): 0.1}

    def lookup(algorithm: str, setting: str, seed: int) -> dict[str, Any] | None:
        value = table.get((algorithm, setting, seed))
        return None if value is None else {"accuracy": [[0, 0.0], [5, value]], "mean": {"m": value - 0.2}}

    found = contrast({"a/x": 1, "b/x": -1}, "final", (0, 1, 2), lookup)
    assert found is not None and found.values == pytest.approx((0.3, 0.4))
    found = contrast({"a/x": 1, "b/x": -1}, "m", (0, 1, 2), lookup, log10=True)
    assert found is not None and found.values == pytest.approx((0.3679767853,))
    assert contrast({"a/x": 1, "b/y": -1}, "final", (0, 1), lookup) is None


def test_outcomes_by_hand(grid: Grid) -> None:
    rows = [
        {"step": 0, "eval/accuracy": 0.3},
        {"step": 1, "reward_mean": 0.2, "grad_norm": 3.0, "trained_tokens": 5.0, "skipped_updates": 0},
        {"step": 2, "reward_mean": 0.4, "grad_norm": float("nan"), "eval/accuracy": 0.8, "trained_tokens": 6.0},
        {"step": 3, "reward_mean": 0.6, "grad_norm": 1.0, "eval/accuracy": 0.5, "trained_tokens": 7.0},
    ]
    found = summarize(rows, grid.collapse)
    values = {name: outcome(found, name) for name in ("final", "best", "area", "fall", "reward", "tokens", "collapsed")}
    assert values == pytest.approx(
        {"final": 0.5, "best": 0.8, "area": 0.65, "fall": 0.3, "reward": 0.4, "tokens": 18, "collapsed": 0}
    )
    assert outcome(found, "grad_norm") == 2.0 and outcome(found, "largest/grad_norm") == 3.0
    assert outcome(found, "clip_fraction_tokens") is None
    assert outcome(summarize(rows[:1], grid.collapse), "final") is None


def test_answers_follow_the_interval() -> None:
    above, below = Claim(claim="", article="", above=0), Claim(claim="", article="", below=0)

    def of(*values: float) -> Estimate:
        return estimate(values) or pytest.fail("no values")

    assert verdict(above, of(0.1, 0.2, 0.3), 3) == "**holds**" == verdict(below, of(-0.1, -0.2, -0.3), 5)
    assert verdict(above, of(-0.1, -0.2, -0.3), 3) == "**does not**" == verdict(below, of(0.1, 0.2, 0.3), 3)
    assert verdict(above, of(-0.1, 0.2, 0.3), 3) == "**does not**: within noise" == verdict(below, of(-1, 0, 1), 3)
    assert verdict(above, of(0.1, 0.2), 5) == "open: 2 of 5 seeds" and verdict(above, None, 5) == "not run"
    assert verdict(Claim(claim="", article="", not_testable="no GPU"), None, 0) == "not testable here"


def test_every_claim_names_settings_of_the_grid_and_a_bound(grid: Grid) -> None:
    kept = kept_of(grid, 0.0)
    for claim in (Claim.model_validate(entry) for entry in yaml.safe_load(CLAIMS.read_text())):
        if claim.not_testable:
            assert not claim.terms and not claim.metric
            continue
        assert (claim.above is None) != (claim.below is None), claim.claim
        assert kept.estimate(claim.terms, claim.metric)[1] >= 3, f"{claim.claim}: an answer needs three seeds"


def test_what_has_not_been_run_is_said_and_no_number_is_printed(grid: Grid) -> None:
    made = blocks(kept_of(grid, 0.0))
    for name in ("main", "stressors", "search"):
        cells = [cell.strip() for line in made[name].splitlines()[2:] for cell in line.strip("|").split("|")]
        assert not [cell for cell in cells if re.search(r"\d\.\d{3}", cell)]
        assert "not run" in cells
    assert made["figures"] == "" and "None of the" in made["progress"]
    assert "holds" not in made["answers"] and "does not**" not in made["answers"]


@pytest.mark.parametrize("share", (0.2, 0.6, 1.0))
def test_a_part_of_the_grid_makes_tables_and_figures(grid: Grid, share: float, tmp_path: Path) -> None:
    kept = kept_of(grid, share)
    made = blocks(kept)
    assert ("not run" in made["stressors"]) == (share < 1)
    assert len(made["answers"].splitlines()) == 2 + len(yaml.safe_load(CLAIMS.read_text()))
    if share == 0.6:
        for name in ALTERNATIVES:
            assert drawn(kept, name)
            assert draw(kept, name, tmp_path / f"{name}.png").stat().st_size > 5000


def test_blocks_are_replaced_and_the_rest_stays() -> None:
    text = "a\n<!-- study_tables: main -->\nold\n<!-- end -->\nb\n"
    once = fill(text, {"main": "new"})
    assert once == "a\n<!-- study_tables: main -->\nnew\n<!-- end -->\nb\n" == fill(once, {"main": "new"})
    with pytest.raises(KeyError):
        fill(text, {})


def test_the_readme_is_that_of_the_kept_summaries(grid: Grid) -> None:
    text = README.read_text()
    assert fill(text, blocks(read_kept(grid))) == text, "run tools/study_tables.py"
    for name in re.findall(r"figures/(\w+)\.png", text):
        assert (FIGURES / f"{name}.png").is_file()


def test_estimates_are_written_with_their_interval() -> None:
    assert write_estimate(Estimate((0.5, 0.7), 0.6, (0.5, 0.7))) == "0.600 [0.500, 0.700]"
    assert write_estimate(Estimate((1.3,), 1.3, None), log10=True) == "x20 (1 seed)"
    assert write_estimate(None) == "not run"


@pytest.fixture
def noise() -> ModuleType:
    spec = importlib.util.spec_from_file_location("noise", ROOT / "tools" / "router_noise" / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_noise_changes_the_choice_and_not_the_weights(noise: ModuleType) -> None:
    class Seam:
        routes: Any = None
        recorded: Any = ()

        def get_replay_topk(self, scores: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
            values, chosen = scores.topk(topk)
            return values, chosen

    torch.manual_seed(0)
    scores = torch.randn(500, 8)
    plain = Seam().get_replay_topk(scores, 2)[1]
    shares = []
    for scale in (0.0, 0.3, 3.0):
        other = type("Other", (Seam,), {})
        noise.add_noise(other, scale)
        values, chosen = other().get_replay_topk(scores, 2)
        assert torch.equal(values, scores.gather(1, chosen))
        shares.append(float((chosen != plain).float().mean()))
        other.recorded = None
        assert torch.equal(other().get_replay_topk(scores, 2)[1], plain), "a cold start has no noise"
    assert shares[0] == 0.0 < shares[1] < shares[2]


def test_noise_is_there_when_the_module_is_imported(
    noise: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_routers.py").write_text("class RouterSeam:\n    def get_replay_topk(self): pass\n")
    monkeypatch.setattr(noise, "ROUTERS", "some_routers")
    monkeypatch.syspath_prepend(str(tmp_path))
    found: list[tuple[Any, float]] = []
    monkeypatch.setattr(noise, "add_noise", lambda seam, scale: found.append((seam, scale)))
    monkeypatch.setattr(sys, "meta_path", [noise.Finder(0.7), *sys.meta_path])
    module = importlib.import_module("some_routers")
    assert found == [(module.RouterSeam, 0.7)]
    assert not any(isinstance(one, noise.Finder) for one in sys.meta_path)
