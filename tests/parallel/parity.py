"""Every layout against the oracle: runs the rows of layouts.py, prints the table and writes it into README.md.

    python -m tests.parallel.parity                 all rows, in one world of 4 and one of 8 ranks
    python -m tests.parallel.parity --part 2/6      the second sixth of the rows; figures of the others stay
    python -m tests.parallel.parity --test          the rows of `make test`
    python -m tests.parallel.parity --only qwen2    the rows of one model
    python -m tests.parallel.parity --bits FILE     only digests, for two commits to compare

Exits 1 when a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.parallel.faults import planted_in
from tests.parallel.layouts import ROWS, Row
from tests.parallel.oracle import file_stem, write_oracle
from tests.parallel.world import run_world

HERE = Path(__file__).parent
FIGURES = HERE / "parity.json"
README = HERE / "README.md"
MARKS = ("<!-- parity: written by make parity -->", "<!-- end of parity -->")
BOUNDS = {
    "float32": {"loss": 1e-6, "gradient": 1e-5, "norm": 1e-6, "sgd": 1e-5, "adam": 1e-6},
    "float64": {"loss": 1e-12, "gradient": 1e-12, "norm": 1e-6, "sgd": 1e-12, "adam": 1e-12},
}
"""Relative, but the loss in units of mean |s A|. Megatron adds the norm up in float32 always."""
FORMS = {"float32": ("packed", "padded"), "float64": ("packed", "padded")}
TIE = 1e-5
"""Closer router logits could change their order with the layout's rounding: the batch keeps away from them."""


def run_rows(
    rows: Sequence[Row],
    directory: Path,
    dtypes: Sequence[str] = tuple(BOUNDS),
    forms: Mapping[str, Sequence[str]] = FORMS,
    faults: Sequence[str | None] = (None,),
    fault_rows: Sequence[str] = (),
    timeout: float = 600,
) -> list[dict[str, Any]]:
    """The distances of rows of one world size, in one started world; see parity_worker.py for what they hold.

    Args:
        rows: of one number of ranks.
        directory: empty; takes oracles, logs and results.
        dtypes: keys of BOUNDS.
        forms: of each type, of FORMS.
        faults: names of faults.py; None = the policy as it is.
        fault_rows: layouts that the faults are planted in; empty = where each says.
        timeout: seconds.
    """
    (ranks,) = {row.ranks for row in rows}
    for model in {row.model for row in rows}:
        write_oracle(model, directory)
    cases = [
        {
            "name": row.name,
            "overrides": row.overrides,
            "model": file_stem(row.model),
            "spread": row.spread,
            "forms": {dtype: list(forms[dtype]) for dtype in dtypes if dtype in row.dtypes},
            "fault": fault,
        }
        for fault in faults
        for row in rows
        if fault is None or row.layout in (fault_rows or planted_in(fault))
    ]
    run_world("parity_worker.py", ranks, cases, directory, timeout)
    return json.loads((directory / "results.json").read_text())


def broken_bounds(result: dict[str, Any]) -> list[str]:
    """What of one result does not hold, a sentence each."""
    bounds = BOUNDS[result["dtype"]]
    said: list[str] = []

    def hold(what: str, value: float, bound: float) -> None:
        if not value <= bound:  # a distance that is not a number holds nothing
            said.append(f"{what} is off by {value:.1e}, bound {bound:.0e}")

    for form in (form for form in FORMS["float32"] if form in result):
        step = result[form]
        hold(f"{form}: loss", step["loss"], bounds["loss"])
        if step["gradient"] is not None:
            hold(f"{form}: gradient of {step['gradient']['name']}", step["gradient"]["worst"], bounds["gradient"])
        hold(f"{form}: gradient norm", step["norm"], bounds["norm"])
        hold(f"{form}: {step['sgd']['name']} after SGD", step["sgd"]["worst"], bounds["sgd"])
        hold(f"{form}: log-probs of scoring and training", step["shift"], 0.0)
        hold(f"{form}: nearness of a router tie", TIE / step["margin"], 1.0)
    hold(f"{result['adam']['name']} after Adam", result["adam"]["worst"], bounds["adam"])
    if not result["skipped"]:
        said.append("a gradient that is not a number changed the weights")
    if not result["saved"]["exact"]:
        said.append("the saved files are not the loaded ones")
    return said


def worst(result: dict[str, Any], figure: str) -> float | None:
    """The larger of packed and padded; None where it is not measured."""
    values = [result[form][figure] for form in FORMS["float32"] if form in result]
    if None in values:
        return None
    return max(value["worst"] if isinstance(value, dict) else value for value in values)


def write_table(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table of README.md."""
    lines = [
        "| ranks | layout | model | loss | gradients | SGD | Adam | float64 | files |",
        "|---:|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in ROWS:
        found = figures.get(row.name)
        if found is None:
            continue
        single, double = found["float32"], found.get("float64")
        cells = [*(worst(single, name) for name in ("loss", "gradient", "sgd")), single["adam"]["worst"]]
        if double is not None:
            doubles = [*(worst(double, name) for name in ("loss", "gradient", "sgd")), double["adam"]["worst"]]
            cells.append(max(value for value in doubles if value is not None))
        exact = "exact" if all(result["saved"]["exact"] for result in found.values()) else "DIFFER"
        shown = " | ".join("in SGD" if cell is None else f"{cell:.1e}" for cell in cells)
        shown += " | none" if double is None else ""
        lines.append(f"| {row.ranks} | {row.layout or 'DP'} | {row.model} | {shown} | {exact} |")
    return "\n".join(lines)


def read_figures(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Results by row and type; none when nothing was run yet."""
    return json.loads(path.read_text()) if path.is_file() else {}


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="1/1", help="I/N: the I-th of N parts of the list")
    parser.add_argument(
        "--bits", type=Path, help="write each row's digests of gradients and weights here, nothing else"
    )
    parser.add_argument(
        "--only", default="", help="only the rows with this text in their name; figures of the others stay"
    )
    parser.add_argument("--test", action="store_true", help="only the rows of make test")
    chosen = parser.parse_args()
    index, count = map(int, chosen.part.split("/"))
    wanted = [row for row in ROWS if (row.in_test or not chosen.test) and chosen.only in row.name]
    rows = wanted[len(wanted) * (index - 1) // count : len(wanted) * index // count]
    figures = read_figures(FIGURES)
    bits: dict[str, dict[str, Any]] = {}
    failed = False
    for ranks in sorted({row.ranks for row in rows}):
        with tempfile.TemporaryDirectory() as directory:
            results = run_rows([row for row in rows if row.ranks == ranks], Path(directory), timeout=3600)
        for result in results:
            taken = {form: result[form].pop("bits") for form in FORMS["float32"] if form in result}
            bits[f"{result['name']}, {result['dtype']}"] = taken
            said = broken_bounds(result)
            failed = failed or bool(said)
            print(f"{result['name']}, {result['dtype']}, {result['seconds']:.1f} s: {'; '.join(said) or 'equal'}")
            figures.setdefault(result["name"], {})[result["dtype"]] = result
    if chosen.bits:
        chosen.bits.write_text(json.dumps(bits, indent=1) + "\n")
        return int(failed)
    known = {row.name for row in ROWS}
    figures = {name: found for name, found in figures.items() if name in known}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    text = README.read_text()
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    README.write_text(f"{before}{MARKS[0]}\n\n{write_table(figures)}\n\n{MARKS[1]}{after}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
