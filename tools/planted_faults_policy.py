"""Check that the parity rows detect faults that other implementations shipped.

Each fault of tests/parallel/faults.py is planted in the running policy, in the layouts that it names, in one world of
4 gloo ranks. Prints a table, writes it to tools/results/planted_faults_policy.md, and exits with 1 if a fault breaks
no bound, or if a row without a fault breaks one.

    python tools/planted_faults_policy.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "tools" / "results" / "planted_faults_policy.md"
TIMEOUT = 1800.0


def main() -> int:
    """Run all faults; print and write the table."""
    sys.path.insert(0, str(ROOT))
    from tests.parallel.faults import FAULTS
    from tests.parallel.layouts import ROWS
    from tests.parallel.parity import broken_bounds, run_rows

    layouts = {layout for planted_in, _ in FAULTS.values() for layout in planted_in}
    # A fault of the tied head shows in the tied model only.
    rows = [row for row in ROWS if row.ranks == 4 and row.layout in layouts and row.in_test]
    with tempfile.TemporaryDirectory() as directory:
        results = run_rows(
            rows, Path(directory), ("float32",), {"float32": ("packed",)}, faults=(None, *FAULTS), timeout=TIMEOUT
        )
    lines = ["| fault | layout | what turned red |", "|---|---|---|"]
    survivors = 0
    for name in (None, *FAULTS):
        found = [result for result in results if result["fault"] == name]
        broken = [(result["name"], bounds) for result in found if (bounds := broken_bounds(result))]
        survivors += bool(broken) == (name is None)
        for layout, bounds in broken:
            lines.append(f"| {name} | {layout} | {_shorten(bounds)} |")
        if not broken:
            lines.append(f"| {name or 'no fault'} | {', '.join(r['name'] for r in found)} | nothing |")
    text = "\n".join(lines)
    print(text)
    caught = len(FAULTS) - survivors
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(f"`make test-faults-policy`: {caught} of {len(FAULTS)} faults turn a row red.\n\n{text}\n")
    return int(survivors > 0)


def _shorten(bounds: list[Any]) -> str:
    """Format the first broken bound and the number of further ones."""
    return str(bounds[0]) + (f" (and {len(bounds) - 1} more)" if len(bounds) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
