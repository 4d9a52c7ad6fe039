"""Routers of a bfloat16 server choose the experts that the trainer's float32 logits choose."""

from __future__ import annotations

from pathlib import Path

from tests.rollout.comparisons import compare


def test_experts_are_those_of_exact_logits(tmp_path: Path) -> None:
    """vLLM's own layer beside ours: where it no longer rounds, ours can go."""
    found = compare("compares_gates.py", tmp_path)
    assert found["vllm"]["dtype"] == "torch.bfloat16" and found["vllm"]["moved"] > 0.01
    for kind in ("ours", "ours, updated"):
        assert found[kind]["dtype"] == "torch.float32" and found[kind]["moved"] < 1e-3
        assert found[kind]["error"] < 1e-5
