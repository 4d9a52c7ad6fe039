"""Layouts that pair every two kinds of parallelism, against Hugging Face in float64, in one started world of 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.models import load_recipe
from gspo_megatron.objective import ObjectiveSpec, runtime_warnings
from tests.parallel.layouts import ROWS, missing_pairs
from tests.parallel.parity import FIGURES, broken_bounds, read_figures, run_rows

TESTED = [row for row in ROWS if row.in_test]
RECIPE = Path("recipes/tiny_moe.yaml")
STALE = "one stale weight"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_rows(TESTED, tmp_path_factory.mktemp("parity"), faults=(None, STALE), fault_rows=("PP2 VPP2 EP2",))


@pytest.mark.parametrize(("name", "dtype"), [(row.name, dtype) for row in TESTED for dtype in row.dtypes])
def test_layout_equals_the_oracle(results: list[dict[str, Any]], name: str, dtype: str) -> None:
    """Loss, every gradient, the steps of both optimizers, saved files, the same log-probs in both passes."""
    (found,) = [r for r in results if (r["name"], r["dtype"], r["fault"]) == (name, dtype, None)]
    assert broken_bounds(found) == []


def test_one_stale_weight_moves_the_first_mini_batch(results: list[dict[str, Any]]) -> None:
    """One parameter of each rank changed between scoring and training: what every run watches must break."""
    stale = [r for r in results if r["fault"] == STALE and r["dtype"] == "float32"]
    assert stale
    for found in stale:
        shift = found["packed"]["shift"]
        assert shift > 1e-6
        metrics = {"log_s_abs_max/minibatch_0": shift, "clip_fraction_tokens/minibatch_0": 0.0}
        codes = [finding.code for finding in runtime_warnings(ObjectiveSpec.preset("gspo"), metrics)]
        assert "first-minibatch-moved" in codes


@pytest.mark.parametrize("rows", [ROWS, TESTED], ids=["make parity", "make test"])
def test_every_pair_of_parallelisms_is_together_in_a_row(rows: list[Any]) -> None:
    at_work = [row.dimensions(load_recipe(RECIPE, row.overrides)) for row in rows]
    assert missing_pairs(at_work) == []


def test_the_published_table_holds_every_row_and_every_bound() -> None:
    figures = read_figures(FIGURES)
    assert {name: tuple(found) for name, found in figures.items()} == {row.name: row.dtypes for row in ROWS}
    broken = {name: [*map(broken_bounds, found.values())] for name, found in figures.items()}
    assert {name: said for name, said in broken.items() if any(said)} == {}
