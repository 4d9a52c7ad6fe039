"""How many process groups a large layout costs; each is a rendezvous of its members when the job starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.places import ROOT


@pytest.mark.parametrize(("layout", "most"), [("32 2 4 2 4", 237), ("128 2 8 8 16", 891)])
def test_no_gloo_group_is_made_beside_each_of_nccl(layout: str, most: int) -> None:
    """Megatron uses them in its own checkpoints of the distributed optimizer only, which are not ours."""
    command = [sys.executable, "-m", "tests.parallel.counts_groups", *layout.split()]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert set(made) == {"default"} and made["default"] <= most, made
