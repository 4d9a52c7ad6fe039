"""Routers of a bfloat16 server choose the experts that the trainer's float32 logits choose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.places import ROOT


def test_experts_are_those_of_exact_logits(tmp_path: Path) -> None:
    """vLLM's own layer beside ours: where it no longer rounds, ours can go."""
    out = tmp_path / "gates.json"
    command = [sys.executable, str(ROOT / "tests" / "rollout" / "compares_gates.py"), str(out)]
    place = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **place})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["vllm"]["dtype"] == "torch.bfloat16" and found["vllm"]["moved"] > 0.01
    for kind in ("ours", "ours, updated"):
        assert found[kind]["dtype"] == "torch.float32" and found[kind]["moved"] < 1e-3
        assert found[kind]["error"] < 1e-5
