"""Host memory that loading and saving take beside the parameters, measured: anonymous pages of a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.places import ROOT

LARGEST = 32768 * 512 * 4
"""Bytes of the worker's embedding; all its tensors together have four times as many."""
ALLOWANCE = 8 * 2**20
"""Python, headers of the files, threads."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    directory = tmp_path_factory.mktemp("load_memory")
    # What is freed goes back to the kernel at once, so that a page counts for as long as somebody holds it.
    place = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.parallel.load_memory_worker", str(directory)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **place},
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-3000:]
    return json.loads(said.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["one rank", "rank 1 of TP2"])
def test_loading_takes_at_most_twice_the_largest_tensor(measured: dict[str, dict[str, int]], case: str) -> None:
    assert measured[case]["loading"] <= 2 * LARGEST + ALLOWANCE


def test_a_loader_that_reads_all_at_once_breaks_the_bound(measured: dict[str, dict[str, int]]) -> None:
    found = measured["all at once"]
    assert found["parameters"] > 4 * LARGEST
    assert found["loading"] > 2 * LARGEST + ALLOWANCE


def test_saving_holds_one_file_at_a_time(measured: dict[str, dict[str, int]]) -> None:
    assert measured["one rank"]["saving"] <= LARGEST + 2**20 + ALLOWANCE
