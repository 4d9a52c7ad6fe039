"""One SLURM lab for all tests of this folder; where none can be had, they are skipped with the reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT, Workplace
from tests.slurm.lab.cluster import Lab, missing
from tests.slurm.leftovers import check_nothing_left


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    # The interpreter's environment and the checkout may lie under /tmp, which is each node's own.
    with Lab(nodes=6, shared=[Path(sys.prefix), ROOT]) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def workplace(lab: Lab) -> Workplace:
    return Workplace(lab)


@pytest.fixture(scope="session")
def bare(lab: Lab) -> Iterator[Workplace]:
    """A second cluster: its SLURM counts no GPUs and queues no job again."""
    with Lab(nodes=2, shared=[Path(sys.prefix), ROOT], gres=False, requeue=False) as cluster:
        yield Workplace(cluster)


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in {"workplace", "bare"} & set(request.fixturenames):
        place = request.getfixturevalue(name)
        place.cancel_all()
        check_nothing_left(place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    place = getattr(item, "funcargs", {}).get("workplace")
    if report.failed and call.when == "call" and place is not None:
        report.sections.append(("SLURM", place.logs()))
    return report
