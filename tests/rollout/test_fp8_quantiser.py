"""Bytes and scales that the trainer sends are those that vLLM's own quantiser makes of the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.places import ROOT


def test_bytes_and_scales_equal_vllms_to_the_bit(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "tests" / "rollout" / "compares_quantisers.py"), str(out)]
    place = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **place})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert len(found) > 50 and sum(case["values"] for case in found.values()) > 3_000_000
    assert not {name: case for name, case in found.items() if case["bytes"] or case["scales"]}
