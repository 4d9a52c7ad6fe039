"""Plan runs whose speed or memory was published, and print planned / measured for each (`make plan-table`).

python tools/plan_table.py          # the table, and the constants
python tools/plan_table.py --write  # and write it to tools/results/plan_table.md
python tools/plan_table.py --fit    # the values that the runs would give the free constants
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from gspo_megatron.plan.estimate.calibration import constants
from tools.plan_fit import ROOT, TIMED, UNITS, Run, fit, fitted_to, left_out, read_runs

TARGET = ROOT / "tools/results/plan_table.md"


def lines(runs: list[Run]) -> Iterator[str]:
    """Yield the table, a section a kind."""
    yield "`predicted` has the constants that were fitted without the run; `fitted` has those of the calibration below."
    yield ""
    for kind, unit in UNITS.items():
        yield f"## {kind.capitalize()}, {unit}"
        yield "| run | measured | planned | fitted / measured | predicted / measured | band |"
        yield "|---|---|---|---|---|---|"
        for run in runs:
            if run.kind == kind:
                band = f"{run.band:.0%}" if run.band else f"none: {run.note}"
                planned = run.planned()
                yield (
                    f"| {run.name} | {run.measured:,g} | {planned:,.4g} | {planned / run.measured:.2f} | "
                    f"{left_out(runs, run):.2f} | {band} |"
                )
        yield ""
    yield "## Calibration"
    yield "| constant | value | range | unit | source | date |"
    yield "|---|---|---|---|---|---|"
    for name, fact in constants():
        yield (
            f"| `{name}` | {fact['value']:g} | {fact['low']:g} to {fact['high']:g} | {fact['unit']} | "
            f"{fact['source']} | {fact['date']} |"
        )


def main() -> None:
    """Print the table, write it on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {TARGET.relative_to(ROOT)}")
    parser.add_argument("--fit", action="store_true", help="print the fitted values only")
    arguments = parser.parse_args()
    runs = read_runs()
    if arguments.fit:
        for kind in TIMED:
            found = fit(runs, kind)
            print(kind, {name: float(f"{getattr(found, name):.3g}") for name in fitted_to(kind)})
        return
    text = "# Planned beside published\n\n" + "\n".join(lines(runs)) + "\n"
    print(text)
    if arguments.write:
        TARGET.write_text(text)


if __name__ == "__main__":
    main()
