"""The table of `make bench`: what it writes it reads, and it knows a ratio that moved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import bench_all


def test_every_benchmark_reads_its_committed_output() -> None:
    for benchmark in bench_all.BENCHMARKS:
        found = json.loads((bench_all.RESULTS / f"{benchmark.name}.json").read_text())
        rows = benchmark.read(found)
        assert rows and all(ratio > 0 for ratio in rows.values()), benchmark.name


def test_a_ratio_that_moved_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([1.0, 1.09, 1.3])
    one = bench_all.Benchmark("some", lambda found: {"seconds of b": found["ratio"]})
    other = bench_all.Benchmark("other", lambda found: {"kept": found["ratio"]})
    monkeypatch.setattr(bench_all, "BENCHMARKS", (one, other))
    monkeypatch.setattr(bench_all, "ROOT", tmp_path)
    monkeypatch.setattr(bench_all, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_all, "TABLE", tmp_path / "bench.md")
    (tmp_path / "other.json").write_text('{"ratio": 2.0}')

    def run(benchmark: bench_all.Benchmark) -> str:
        (tmp_path / f"{benchmark.name}.json").write_text(json.dumps({"ratio": next(results)}))
        return ""

    monkeypatch.setattr(bench_all, "run", run)
    monkeypatch.setattr("sys.argv", ["bench_all", "some"])
    codes = [bench_all.main() for _ in range(3)]
    table = (tmp_path / "bench.md").read_text()
    assert codes == [0, 0, 1], table
    assert "| `some` | seconds of b | 1.3 | 1.09 | differs |" in table and "| `other` | kept | 2 | 2 |  |" in table
