"""A gloo world of 2: loss, gradient and metrics of every case against the float64 oracle.

The world starts once; sequences are split over data-parallel ranks, one a micro-batch, all on one rank, and zig-zag
over context-parallel ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests import reference
from tests.parallel.objective_world import LAYOUTS, cases
from tests.places import ROOT
from tests.unit.objective.cases import FIXTURES, Layout, as_rows, assert_same, engine
from tests.waiting import HANG

CASES = cases()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("objective_world")
    command = [sys.executable, "-m", "tests.parallel.objective_world", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [subprocess.Popen([*command, str(rank), "2"], cwd=ROOT, env=environment) for rank in range(2)]
    try:
        codes = [rank.wait(timeout=HANG) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0]
    return json.loads((directory / "results.json").read_text())


def oracle(name: str) -> tuple[float, list[torch.Tensor]]:
    case = CASES[name]
    group = name.split("/")[0]
    if name.startswith("drawn/") or group == "B":
        return reference.gradients(reference.OBJECTIVES[name.split("/")[1]], case.answers)
    if group in ("A", "A2", "Bside"):
        return reference.gradients(reference.gspo, case.answers)
    if group == "C":
        return reference.gradients(reference.gspo_token, case.answers)
    if group == "H":
        return reference.gradients(
            lambda answers: reference.sequence_mean(answers, reference.sequence_ratio), case.answers
        )
    if group == "correction":
        value, grads = 0.0, []
        bounds = {"low": 0.8, "high": 1.2, "cap": 2.0, "below": 0.5, "delta": 1e-4, "region": 0.3}
        for answer in case.answers:
            factor = torch.tensor(reference.correction(name.split("/")[1], answer, **bounds), dtype=torch.float64)
            one, grad = reference.gradients(reference.gspo, [answer])
            value += one * float(factor.mean()) / len(case.answers)
            grads.append(grad[0] * factor / len(case.answers))
        return value, grads
    return {
        "seq_mean_token_mean": lambda: reference.gradients(reference.grpo, case.answers),
        "token_mean": lambda: reference.gradients(reference.dapo, case.answers),
        "seq_mean_token_sum": lambda: reference.gradients(reference.rloo, case.answers),
        "constant": lambda: reference.gradients(lambda a: reference.dr_grpo(a, length=8), case.answers),
    }[name.split("/")[1]]()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_the_oracle_s(world: dict[str, Any], name: str, layout: str) -> None:
    value, grads = oracle(name)
    got = world[f"{name}@{layout}"]
    assert got["value"] == pytest.approx(value, abs=1e-12)
    assert_same([torch.tensor(g, dtype=torch.float64) for g in got["grads"]], grads, 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_metrics_are_those_of_one_process(world: dict[str, Any], name: str, layout: str) -> None:
    case = CASES[name]
    alone = Layout(
        [list(range(len(case.answers)))], token_advantages=case.token_advantages or case.spec.has_token_advantages
    )
    sums = engine(case.spec, as_rows(case.answers), alone)[2]
    for metric, value in world[f"{name}@{layout}"]["metrics"].items():
        assert value == pytest.approx(sums[metric], abs=1e-9), metric


def test_metric_sums_that_are_added_before_they_travel_are_the_old_ones(world: dict[str, Any]) -> None:
    """One reduction of what each rank added first, against every micro-batch of every rank gathered and added."""
    compared = world["reductions"]
    assert len(compared) == 3 and {"log_s_histogram", "log_s_abs/max", "correction_weight"} <= compared[0].keys()
    for minibatch in compared:
        for name, (reduced, by_hand) in minibatch.items():
            new, old = torch.tensor(reduced, dtype=torch.float64), torch.tensor(by_hand, dtype=torch.float64)
            torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12, msg=name)
    assert sum(minibatch["tokens"][1] for minibatch in compared) > 0


def test_the_hand_numbers_come_out_of_the_world(world: dict[str, Any]) -> None:
    for layout in LAYOUTS:
        for name, expected in (
            ("B/gspo", FIXTURES["B"]["objective"]),
            ("B/grpo", FIXTURES["B"]["grpo_0.2_0.27"]["objective"]),
            ("Bside", FIXTURES["Bside"]["objective"]),
            ("C", FIXTURES["C"]["value"]),
            ("H", FIXTURES["H"]["s"]),
            ("agg/seq_mean_token_mean", -FIXTURES["agg"]["seq_mean_token_mean"]),
            ("agg/token_mean", -FIXTURES["agg"]["token_mean"]),
            ("agg/seq_mean_token_sum", -FIXTURES["agg"]["seq_mean_token_sum"]),
            ("agg/constant", -FIXTURES["agg"]["dr_grpo_const_L=8"]),
        ):
            assert world[f"{name}@{layout}"]["value"] == pytest.approx(expected, abs=1e-10), (name, layout)
        clipped = world[f"B/gspo@{layout}"]["metrics"]
        assert (clipped["clip_low_sequences"], clipped["clip_high_sequences"]) == pytest.approx((1, 1))
