"""Every benchmark that fits 2 cores, and the one table of their ratios: `make bench`.

    python tools/bench_all.py [NAME ...]

Writes the output of each to `tools/results/NAME.json` and the ratios to `tools/results/bench.md`. A ratio that differs
from the one in the table by more than 10 % is marked, and the exit status is then 1. Seconds are not compared: they are
those of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools" / "results"
TABLE = RESULTS / "bench.md"
REPRODUCED = 0.1
"""Most that a ratio may differ from its last one, of the larger."""
LIMIT = 900
"""Seconds of one benchmark."""
LINE = re.compile(r"^\| `(?P<name>\w+)` \| (?P<what>[^|]+) \| (?P<ratio>[0-9.]+) \|")
HEAD = """# Benchmarks

By `make bench` on {cores} cores, {date}. Less is better unless a row says otherwise.
The whole output of each is beside this file.

| benchmark | ratio | value | earlier | |
|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A program of this folder that prints one JSON object, and what is read from it."""

    name: str
    read: Callable[[dict[str, Any]], dict[str, float]]
    arguments: tuple[str, ...] = ()


def read_packing(found: dict[str, Any]) -> dict[str, float]:
    """The mean over all cells of each number of sequences."""
    rows = {}
    for count in sorted({cell["sequences"] for cell in found["cells"]}, reverse=True):
        cells = [cell for cell in found["cells"] if cell["sequences"] == count]
        rows[f"W over the proved bound, {count} sequences, mean of {len(cells)} cells"] = mean(
            cell["relative_mean"] for cell in cells
        )
    return rows


def read_head(found: dict[str, Any]) -> dict[str, float]:
    """The largest of its cases."""
    return {
        "operations of the log-prob head over 2THV, most": max(one["operations_over_2THV"] for one in found["cases"]),
        "its workspace over the planned, most": max(
            one["workspace_bytes"] / one["workspace_bytes_by_formula"] for one in found["cases"]
        ),
    }


def read_rollout(found: dict[str, Any]) -> dict[str, float]:
    """Each policy's share of the bound."""
    return {
        f"share of the bound, {row['lengths']}, {row['policy']} (more is better)": row["of_bound"]
        for row in found["policies"]
    }


BENCHMARKS = (
    Benchmark("bench_packing", read_packing),
    Benchmark("bench_head", read_head),
    Benchmark(
        "bench_step_cost",
        lambda found: {
            "forward passes a trained token": found["forward_equivalents"]["ours"],
            "the same on the sampler's log-probs": found["forward_equivalents"]["ours_sampler"],
        },
    ),
    Benchmark(
        "bench_checkpoint",
        lambda found: {"stall of an asynchronous save, in copies of its bytes": found["asynchronous"]["copies"]},
    ),
    Benchmark("simulate_rollout", read_rollout),
    Benchmark(
        "plan_weight_sync",
        lambda found: {
            "received over needed bytes, most": max(pair["received_over_needed"]["most"] for pair in found["pairs"]),
            "busiest sender over the mean, most": max(pair["busiest_sender_over_mean"] for pair in found["pairs"]),
        },
    ),
    Benchmark(
        "bench_controller",
        lambda found: {
            "controller's processor seconds a million tokens": found["cpu_seconds_per_million_tokens"],
        },
        ("--tokens=12500",),
    ),
)


def main() -> int:
    """Run, compare, write. 1 if a benchmark failed or a ratio was not reproduced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(names)}; the others stay")
    wanted = parser.parse_args().names or names
    if strangers := set(wanted) - set(names):
        parser.error(f"{', '.join(sorted(strangers))}: no benchmark; choose of {', '.join(names)}")
    earlier, lines, fault = read_table(TABLE.read_text() if TABLE.is_file() else ""), [], False
    for benchmark in BENCHMARKS:
        if benchmark.name in wanted:
            failed = run(benchmark)
            fault |= bool(failed)
            print(f"{benchmark.name}: {failed or 'done'}", flush=True)
        file = RESULTS / f"{benchmark.name}.json"
        for what, ratio in benchmark.read(json.loads(file.read_text())).items() if file.is_file() else ():
            before = earlier.get((benchmark.name, what))
            moved = benchmark.name in wanted and before is not None and not is_reproduced(ratio, before)
            fault |= moved
            shown = "" if before is None else f"{before:.4g}"
            lines.append(f"| `{benchmark.name}` | {what} | {ratio:.4g} | {shown} | {'differs' if moved else ''} |")
    TABLE.write_text(HEAD.format(cores=os.cpu_count(), date=datetime.now(UTC).date()) + "\n".join(lines) + "\n")
    print(f"{TABLE.relative_to(ROOT)} is written")
    return int(fault)


def run(benchmark: Benchmark) -> str:
    """Run one and keep its output; why that failed, or an empty text. One that misses a bound of its own has output."""
    command = [sys.executable, str(ROOT / "tools" / f"{benchmark.name}.py"), "--json", *benchmark.arguments]
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, cwd=ROOT, env=environment)
    except subprocess.TimeoutExpired:
        return f"took more than {LIMIT} s"
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return f"exit {done.returncode}: {done.stderr.strip()[-300:]}"
    file = RESULTS / f"{benchmark.name}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    missed = f"misses a bound of its own (exit {done.returncode})" if done.returncode else ""
    print(f"{benchmark.name}: {time.monotonic() - began:.0f} s", flush=True)
    return missed


def read_table(text: str) -> dict[tuple[str, str], float]:
    """The ratios of a table, by benchmark and what they are."""
    rows = map(LINE.match, text.splitlines())
    return {(row["name"], row["what"]): float(row["ratio"]) for row in rows if row}


def is_reproduced(ratio: float, before: float) -> bool:
    """Whether two runs agree."""
    return abs(ratio - before) <= REPRODUCED * max(abs(ratio), abs(before))


if __name__ == "__main__":
    sys.exit(main())
