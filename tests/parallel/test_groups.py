"""How many process groups a large layout costs; each is a rendezvous of its members when the job starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.places import ROOT


@pytest.mark.parametrize(("layout", "most"), [("32 2 4 2 4", 135), ("128 2 8 8 16", 290)])
def test_no_group_is_made_that_no_call_uses(layout: str, most: int) -> None:
    """No gloo group beside each of NCCL: Megatron uses them in its own checkpoints only, which are not ours.

    One for each rank alone, and none of a kind that megatron only asks its size. The table of the policy names
    the calls of each kind.
    """
    command = [sys.executable, "-m", "tests.parallel.counts_groups", *layout.split()]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["all"] <= most and not [kind for kind in made["kinds"] if kind.endswith("GLOO")], made
    table = (ROOT / "gspo_megatron" / "policy" / "README.md").read_text(encoding="utf-8")
    assert not [kind for kind in made["kinds"] if f"| `{kind}`" not in table]
