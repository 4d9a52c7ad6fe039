"""The estimates beside runs that were published: bands, the range that is printed, and the committed table."""

from __future__ import annotations

from functools import lru_cache

import pytest

from gspo_megatron.plan.estimate.calibration import CALIBRATED, TIME_RANGE, constants
from tools.plan_fit import TIMED, Run, fit, fitted_to, left_out, read_runs
from tools.plan_table import TARGET

RUNS = read_runs()
MISSED = {
    # Small micro-batches in a release of 2025: see `gspo_megatron/plan/NOTES.md`.
    "235B TP4 PP8 EP8, 256 H100, 4K",
    # The first overlapped dispatch hid a third of the exchange, that of 2026 four fifths.
    "235B TP2 PP8 EP32, 256 H100, 4K, DeepEP, overlapped",
}
"""Runs outside their bands, each also in the notes. A run that comes back leaves the list."""


@lru_cache
def predicted(name: str) -> float:
    run = next(run for run in RUNS if run.name == name)
    return left_out(RUNS, run)


def banded(*kinds: str) -> list[Run]:
    return [run for run in RUNS if run.band and run.kind in kinds]


@pytest.mark.parametrize("run", banded("trainer", "scoring", "step", "memory"), ids=lambda run: run.name)
def test_a_run_is_planned_within_its_band(run: Run) -> None:
    """With constants that were fitted without it."""
    assert run.band is not None
    inside = abs(predicted(run.name) - 1) <= run.band + 5e-3
    assert inside != (run.name in MISSED), f"{run.name}: {predicted(run.name):.3f}"


def test_the_printed_range_holds_for_nineteen_of_twenty_runs() -> None:
    times = []
    for run in banded("trainer", "scoring", "step"):
        ratio = predicted(run.name)
        # Of speeds the ratio is planned / measured too, but a time is its inverse.
        times.append(1 / ratio if run.kind == "step" else ratio)
    low, high = TIME_RANGE
    assert sum(low <= time <= high for time in times) >= 0.95 * len(times), sorted(times)


def test_the_calibration_is_the_fit() -> None:
    for kind in TIMED:
        found = fit(RUNS, kind)
        for name in fitted_to(kind):
            assert getattr(CALIBRATED, name) == pytest.approx(getattr(found, name), rel=0.03), name


def test_every_constant_has_a_source_and_lies_in_its_range() -> None:
    for name, fact in constants():
        assert fact["source"] and fact["date"] and fact["unit"], name
        assert fact["low"] <= fact["value"] <= fact["high"], name


def test_the_committed_table_has_the_residuals_of_today() -> None:
    text = TARGET.read_text()
    for run in RUNS:
        row = next(line for line in text.splitlines() if line.startswith(f"| {run.name} |"))
        assert row.split(" | ")[3:5] == [f"{run.ratio():.2f}", f"{predicted(run.name):.2f}"], "run make plan-table"
