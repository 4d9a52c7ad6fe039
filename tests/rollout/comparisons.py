"""Programs beside the tests that hold vLLM's own code against ours, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.places import ROOT


def compare(program: str, folder: Path) -> dict[str, Any]:
    """What `tests/rollout/PROGRAM` writes into the file that it is given."""
    out = folder / "found.json"
    place = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "rollout" / program), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **place})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())
