"""The study's runner: which cells there are, and that an interrupted grid ends with each cell run to its end once."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from gspo_megatron.models import load_recipe
from gspo_megatron.plan import check
from tools.study import NOT_FINITE, Study, chosen_cells, environment_of, run_cells
from tools.study_grid import FOLDER, Cell, Grid, fault_of, read_grid
from tools.study_summary import collapsed_at, read_summaries

RUN = """
import json, pathlib, sys
place, how = pathlib.Path(sys.argv[1]), sys.argv[2]
place.mkdir(parents=True, exist_ok=True)
with (place / "metrics.jsonl").open("w") as file:
    for step in range(3):
        row = {"step": step, "eval/accuracy": 0.25 * step}
        file.write(json.dumps(row | ({"reward_mean": 0.5, "trained_tokens": 7.0} if step else {})) + "\\n")
if how == "killed":
    sys.exit(143)
if how == "broken":
    sys.exit(1)
if how == "diverged":
    sys.exit("5 updates in a row had gradients that are not finite")
(place / "DONE").touch()
"""
"""What stands in for `gspo train`: it writes the files that the runner reads, and ends as the test wants."""


@pytest.fixture(scope="module")
def grid() -> Grid:
    return read_grid()


class Driver:
    """A study whose cells are RUN; counts how often each was started."""

    def __init__(self, grid: Grid, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.study = Study(grid, place / "runs", place / "summaries")
        self.how: dict[str, list[str]] = {}
        self.started: list[str] = []

        def command(_: Study, cell: Cell, run: Path) -> list[str]:
            self.started.append(cell.name)
            ends = self.how.get(cell.name, [])
            return [sys.executable, "-S", "-c", RUN, str(run), ends.pop(0) if ends else "finished"]

        monkeypatch.setattr(Study, "command", command)

    def run(self, cells: Sequence[Cell], jobs: int = 1) -> dict[str, str]:
        known = read_summaries(self.study.summaries, cells)
        left = [cell for cell in cells if cell.name not in known]
        return {cell.name: fault for cell, fault in run_cells(self.study, left, jobs, again=False)}


@pytest.fixture
def driver(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(grid, tmp_path, monkeypatch)


def test_the_grid_is_what_the_issue_asks_for(grid: Grid) -> None:
    cells = grid.cells()
    assert len({cell.name for cell in cells}) == len({cell.digest for cell in cells}) == len(cells)
    for name in grid.algorithms:
        seeds = [cell.seed for cell in cells if (cell.algorithm, cell.setting) == (name, "base")]
        assert sorted(seeds) == [0, 1, 2, 3, 4]
    for stressor, it in grid.stressors.items():
        for value in () if stressor in ("base", "combined") else it.values:
            found = [cell for cell in cells if (cell.stressor, cell.value) == (stressor, value)]
            assert sorted((cell.algorithm, cell.seed) for cell in found) == [
                (name, seed) for name in ("grpo", "gspo") for seed in range(3)
            ]


def test_cells_are_recipes_that_a_run_takes(grid: Grid) -> None:
    settings = {(cell.algorithm, cell.setting): cell for cell in grid.cells()}
    for cell in settings.values():
        assert not fault_of(grid, cell), cell.name
        recipe = load_recipe(FOLDER / grid.recipe, cell.overrides)
        assert not [finding for finding in check(recipe, 1) if finding.severity == "error"], cell.name
        assert recipe.run.seed == cell.seed


def test_budgets_are_equal(grid: Grid) -> None:
    """Cells of one setting differ in the objective alone."""
    for one in grid.cells():
        other = grid.cell("grpo", one.stressor, one.value, one.seed)
        left, right = (load_recipe(FOLDER / grid.recipe, cell.overrides) for cell in (one, other))
        assert left.model_copy(update={"objective": right.objective}) == right, one.name
        if one.seed > 0:
            break


def test_a_block_of_an_unknown_name_is_refused(grid: Grid) -> None:
    values = grid.model_dump()
    values["blocks"] = [{"name": "x", "algorithms": ["gspo"], "stressors": ["lr-7"], "seeds": [0]}]
    with pytest.raises(ValueError, match="block x names lr-7"):
        Grid.model_validate(values)


def test_cells_are_chosen_by_pattern(grid: Grid) -> None:
    assert [cell.name for cell in chosen_cells(grid, ["grpo-lr-3e-4-s2"])] == ["grpo-lr-3e-4-s2"]
    assert {cell.seed for cell in chosen_cells(grid, ["*-base-s1", "*-base-s2"])} == {1, 2}
    with pytest.raises(ValueError, match="no cell of the grid is called gspo-s9"):
        chosen_cells(grid, ["gspo-base-s0", "gspo-s9"])


def test_a_finished_cell_is_not_run_again(grid: Grid, driver: Driver) -> None:
    cells = grid.cells()[:3]
    assert set(driver.run(cells, jobs=2).values()) == {""}
    assert driver.run(cells) == {} and len(driver.started) == 3
    summary = read_summaries(driver.study.summaries, cells)[cells[0].name]
    assert summary["accuracy"] == [[0, 0.0], [1, 0.25], [2, 0.5]] and summary["trained_tokens"] == 14
    assert (
        {"wall_seconds", "processor_seconds", "package"} <= set(summary)
        and summary["commit"]
        and summary["ended"] == "finished"
    )


def test_an_interrupted_cell_goes_on_in_its_place(grid: Grid, driver: Driver) -> None:
    cell = grid.cells()[0]
    driver.how[cell.name] = ["killed"]
    assert "exit code 143" in driver.run([cell])[cell.name]
    assert driver.run([cell]) == {cell.name: ""}
    kept = driver.study.runs / cell.name
    assert [path.name for path in kept.glob("attempt_?")] == ["attempt_1"]
    assert read_summaries(driver.study.summaries, [cell])[cell.name]["starts"] == 2


def test_under_another_package_an_interrupted_cell_starts_anew_and_nothing_is_removed(
    grid: Grid, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = grid.cells()[0]
    driver.how[cell.name] = ["killed"]
    driver.run([cell])
    monkeypatch.setattr("tools.study.code_facts", lambda: {"commit": "c", "package": "another", "hardware": "h"})
    assert driver.run([cell]) == {cell.name: ""}
    kept = driver.study.runs / cell.name
    assert sorted(path.name for path in kept.glob("attempt_?")) == ["attempt_1", "attempt_2"]
    summary = read_summaries(driver.study.summaries, [cell])[cell.name]
    assert (summary["package"], summary["starts"]) == ("another", 1)


def test_a_run_whose_summary_was_not_written_is_not_repeated(grid: Grid, driver: Driver) -> None:
    cell = grid.cells()[0]
    driver.run([cell])
    (file,) = driver.study.summaries.iterdir()
    before = file.read_text()
    file.unlink()
    driver.run([cell])
    assert file.read_text() == before and len(driver.started) == 1


def test_a_failure_is_named_and_the_others_run(grid: Grid, driver: Driver) -> None:
    cells = grid.cells()[:2]
    driver.how[cells[0].name] = ["broken"]
    faults = driver.run(cells)
    assert "exit code 1" in faults[cells[0].name] and faults[cells[1].name] == ""
    assert list(read_summaries(driver.study.summaries, cells)) == [cells[1].name]


def test_a_run_that_diverged_is_a_collapse(grid: Grid, driver: Driver) -> None:
    cell = grid.cells()[0]
    driver.how[cell.name] = ["diverged"]
    assert driver.run([cell]) == {cell.name: ""}
    summary = read_summaries(driver.study.summaries, [cell])[cell.name]
    assert (summary["ended"], summary["collapsed_at"]) == (NOT_FINITE, 2)


def test_the_summary_of_a_changed_cell_does_not_count(grid: Grid, driver: Driver) -> None:
    cell = grid.cells()[0]
    driver.run([cell])
    changed = Cell(cell.algorithm, cell.stressor, cell.value, cell.seed, (*cell.overrides, "optimizer.lr=0"), 0.0)
    assert read_summaries(driver.study.summaries, [changed]) == {}
    driver.run([changed])
    assert len(driver.started) == 2


@pytest.mark.parametrize("seed", range(4))
def test_whatever_interrupts_it_the_grid_ends_whole(grid: Grid, driver: Driver, seed: int) -> None:
    draw, cells = random.Random(seed), grid.cells()[:4]
    driver.how = {cell.name: draw.choices(["killed", "broken"], k=draw.randrange(3)) for cell in cells}
    wanted = {name: len(ends) + 1 for name, ends in driver.how.items()}
    for _ in range(4):
        driver.run(cells, jobs=draw.randrange(1, 3))
        for part in driver.study.summaries.glob(".*.part"):
            part.unlink()
    assert {cell.name: driver.started.count(cell.name) for cell in cells} == wanted
    assert len(read_summaries(driver.study.summaries, cells)) == len(cells)


def test_a_stop_ends_the_cell_that_runs_and_starts_no_other(grid: Grid, tmp_path: Path) -> None:
    study = Study(grid, tmp_path, tmp_path, longest=0.2)
    code, _ = study.execute([sys.executable, "-S", "-c", "import time; time.sleep(600)"], tmp_path / "log", {})
    assert code == -15
    study.stop()
    assert dict(run_cells(study, grid.cells()[:1], 1, again=False)) == {grid.cells()[0]: "was not started"}


def test_routing_noise_reaches_the_processes_of_its_cells_only(grid: Grid) -> None:
    quiet, noisy = grid.cell("gspo", "base", "", 0), grid.cell("gspo", "noise", "0.3", 0)
    assert "router_noise" not in json.dumps(environment_of(quiet))
    found = environment_of(noisy)
    assert found["GSPO_STUDY_ROUTER_NOISE"] == "0.3" and "tools/router_noise" in found["PYTHONPATH"].split(":")[0]


def test_a_collapse_is_two_evaluations_far_below_the_best(grid: Grid) -> None:
    def at(*values: float) -> int | None:
        return collapsed_at([(5 * place, value) for place, value in enumerate(values)], grid.collapse)

    assert at(0.3, 0.9, 0.75, 0.71, 0.9) is None
    assert at(0.3, 0.9, 0.7, 0.71, 0.69) is None
    assert at(0.3, 0.9, 0.7, 0.69) == 10
    assert at(0.3, 0.9, 0.2, 0.9, 0.1, 0.1) == 20
    assert at(0.22, 0.1, 0.05) == 5
    assert at(0.3, 0.9, float("nan"), float("nan")) == 10
    assert at() is None
