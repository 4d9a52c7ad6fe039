"""Bytes and scales that the trainer sends are those that vLLM's own quantiser makes of the same weights."""

from __future__ import annotations

from pathlib import Path

from tests.rollout.comparisons import compare


def test_bytes_and_scales_equal_vllms_to_the_bit(tmp_path: Path) -> None:
    found = compare("compares_quantisers.py", tmp_path)
    assert len(found) > 50 and sum(case["values"] for case in found.values()) > 3_000_000
    assert not {name: case for name, case in found.items() if case["bytes"] or case["scales"]}
