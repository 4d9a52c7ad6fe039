"""Remake the tables and figures of recipes/study/README.md from the kept summaries: `python tools/study_tables.py`.

Nothing is run. What has no summary is printed as `not run`. `--check` changes nothing and exits with 1 where the tables
are not those of the summaries.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.study_grid import FOLDER, SUMMARIES, Cell, Grid, fault_of, read_grid
from tools.study_statistics import Estimate, contrast
from tools.study_summary import read_summaries

README = FOLDER / "README.md"
CLAIMS = FOLDER / "claims.yaml"
FIGURES = FOLDER / "figures"
FEWEST = 3
"""Seeds without which a claim has no answer."""
BLOCK = re.compile(r"(<!-- study_tables: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = {
    "final": "accuracy at the end",
    "area": "mean of evaluations",
    "reward": "sampled reward",
    "fall": "largest fall",
    "collapsed": "collapsed",
    "clip_fraction_tokens": "clipped tokens",
    "largest/grad_norm": "largest gradient norm",
    "experts/probe_changed": "experts changed",
}
"""Columns of the main table: outcome or metric, and its title."""


class Claim(BaseModel):
    """A claim of the articles."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    claim: str
    article: str
    metric: str = ""
    terms: dict[str, float] = {}
    scale: Literal["plain", "log10"] = "plain"
    above: float | None = None
    below: float | None = None
    not_testable: str = ""


@dataclass(frozen=True, slots=True)
class Kept:
    """The grid, and what is kept of it."""

    grid: Grid
    cells: tuple[Cell, ...]
    summaries: Mapping[str, Mapping[str, Any]]

    def lookup(self, algorithm: str, setting: str, seed: int) -> Mapping[str, Any] | None:
        """The summary of a cell; None where there is none."""
        return self.summaries.get(f"{algorithm}-{setting}-s{seed}")

    def seeds(self, algorithm: str, setting: str) -> list[int]:
        """Seeds that the grid has of a setting."""
        return [cell.seed for cell in self.cells if (cell.algorithm, cell.setting) == (algorithm, setting)]

    def estimate(self, terms: Mapping[str, float], metric: str, log10: bool = False) -> tuple[Estimate | None, int]:
        """A contrast over the seeds that all its settings have, and how many these are to be."""
        seeds = sorted(set.intersection(*(set(self.seeds(*name.split("/"))) for name in terms)))
        return contrast(terms, metric, seeds, self.lookup, log10), len(seeds)


def verdict(claim: Claim, found: Estimate | None, planned: int) -> str:
    """One of: holds, does not, not run, open, not testable here."""
    if claim.not_testable:
        return "not testable here"
    if found is None:
        return "not run"
    if len(found.values) < min(FEWEST, planned) or found.interval is None:
        return f"open: {len(found.values)} of {planned} seeds"
    low, high = found.interval
    if claim.above is not None:
        bound, holds, opposite = claim.above, low > claim.above, high < claim.above
    else:
        assert claim.below is not None, f"the claim {claim.claim!r} has no bound"
        bound, holds, opposite = claim.below, high < claim.below, low > claim.below
    return "**holds**" if holds else "**does not**" if opposite or bound else "**does not**: within noise"


def write_estimate(found: Estimate | None, log10: bool = False) -> str:
    """`0.912 [0.897, 0.930]`, as a factor where it is a logarithm; `not run`."""
    if found is None:
        return "not run"
    numbers = [found.mean, *(found.interval or ())]
    if log10:
        numbers = [10**number for number in numbers]
    first, *ends = (f"{number:.3g}" if log10 or abs(number) >= 10 else f"{number:.3f}" for number in numbers)
    text = f"{'x' if log10 else ''}{first}" + (f" [{ends[0]}, {ends[1]}]" if ends else "")
    return text if ends else f"{text} (1 seed)"


def write_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def answers(kept: Kept) -> str:
    """One row a claim."""
    rows = []
    for claim in (Claim.model_validate(entry) for entry in yaml.safe_load(CLAIMS.read_text())):
        log10 = claim.scale == "log10"
        found, planned = kept.estimate(claim.terms, claim.metric, log10) if claim.terms else (None, 0)
        seeds = f"{len(found.values)} of {planned}" if found else ""
        effect = claim.not_testable or (write_estimate(found, log10) if found else "")
        patterns = " ".join(sorted(f"'{name.replace('/', '-')}-s*'" for name in claim.terms))
        command = f"`tools/study.py {patterns}`" if patterns else ""
        rows.append([claim.claim, claim.article, verdict(claim, found, planned), effect, seeds, command])
    return write_table(["claim", "article", "answer", "effect, 95 %", "seeds", "command"], rows)


def main_table(kept: Kept) -> str:
    """The algorithms side by side without a stressor."""
    rows = []
    for name, algorithm in kept.grid.algorithms.items():
        planned = [cell for cell in kept.cells if cell.algorithm == name and cell.setting == "base"]
        done = sum(cell.name in kept.summaries for cell in planned)
        missing = "not run" if not planned or not fault_of(kept.grid, planned[0]) else "not yet"
        values = [kept.estimate({f"{name}/base": 1}, metric)[0] for metric in COLUMNS]
        texts = [write_estimate(value) if value else missing for value in values]
        rows.append([algorithm.title, f"{done} of {len(planned)}", *texts])
    return write_table(["objective", "seeds", *COLUMNS.values()], rows)


def stressor_table(kept: Kept, names: Sequence[str]) -> str:
    """GSPO and GRPO under each value of these stressors."""
    rows = []
    for stressor in names:
        for value in kept.grid.stressors[stressor].values:
            setting = f"{stressor}-{value}"
            pair = [f"gspo/{setting}", f"grpo/{setting}"]
            finals = [write_estimate(kept.estimate({name: 1}, "final")[0]) for name in pair]
            difference = write_estimate(kept.estimate({pair[0]: 1, pair[1]: -1}, "final")[0])
            collapsed = [count_collapsed(kept, *name.split("/")) for name in pair]
            clipped = [write_mean(kept.estimate({name: 1}, "clip_fraction_tokens")[0]) for name in pair]
            rows.append([kept.grid.stressors[stressor].title, value, *finals, difference, *collapsed, *clipped])
    head = ["stressor", "value", "GSPO, accuracy at the end", "GRPO", "difference", "GSPO collapsed", "GRPO collapsed",
            "GSPO clipped tokens", "GRPO clipped tokens"]  # fmt: skip
    return write_table(head, rows)


def count_collapsed(kept: Kept, algorithm: str, setting: str) -> str:
    """`1 of 3`: runs that collapsed, of those that are kept."""
    found = [kept.lookup(algorithm, setting, seed) for seed in kept.seeds(algorithm, setting)]
    runs = [summary for summary in found if summary is not None]
    return f"{sum(run['collapsed_at'] is not None for run in runs)} of {len(runs)}" if runs else "not run"


def write_mean(found: Estimate | None) -> str:
    """A mean alone."""
    return f"{found.mean:.2g}" if found else "not run"


def progress(kept: Kept) -> str:
    """What is kept, what it took, and what the whole grid takes."""
    known, total = list(kept.summaries.values()), len(kept.cells)
    if not known:
        return f"None of the {total} cells has been run."
    taken: dict[str, list[float]] = {}
    for summary in known:
        taken.setdefault(kind_of(summary["cell"], kept), []).append(summary["processor_seconds"])
    usual = fmean(summary["processor_seconds"] for summary in known)
    whole = sum(fmean(taken.get(kind_of(cell.name, kept), [usual])) for cell in kept.cells) / 3600
    commits = sorted({summary["package"] for summary in known})
    dates = sorted({summary["date"] for summary in known})
    rows = [
        ["cells kept", f"{len(known)} of {total}"],
        ["run", f"{dates[0]} to {dates[-1]}, {known[0]['hardware']}"],
        ["trees of the package", ", ".join(commits)],
        ["processor seconds of a cell, mean", f"{usual:.0f}; taken for what has not been run"],
        ["the whole grid", f"{whole:.1f} processor hours; {whole / 2:.1f} h with `--jobs 2` on two free cores"],
    ]
    return write_table(["what", "how much"], rows)


def kind_of(name: str, kept: Kept) -> str:
    """Stressor and value of a cell by its name: cells of one kind take about as long."""
    return next(cell.setting for cell in kept.cells if cell.name == name)


def blocks(kept: Kept) -> dict[str, str]:
    """The text of each block of the README."""
    scales = [name for name in kept.grid.stressors if name not in ("base", "combined")]
    return {
        "answers": answers(kept),
        "progress": progress(kept),
        "main": main_table(kept),
        "stressors": stressor_table(kept, scales),
        "search": stressor_table(kept, ["combined"]),
        "figures": "\n\n".join(
            f"![{alt}](figures/{name}.png)" for name, alt in ALTERNATIVES.items() if drawn(kept, name)
        ),
    }


ALTERNATIVES = {
    "main": "Held-out accuracy by rollout batch of each objective, mean and 95 % interval over seeds",
    "stressors": "Held-out accuracy at the end of GSPO and GRPO for each value of each stressor",
    "combined": "Held-out accuracy by rollout batch of GSPO and GRPO where several stressors act at once",
}
"""The figures, and what they show in words."""


def drawn(kept: Kept, name: str) -> bool:
    """Whether a figure has something to show."""
    wanted = {"main": ("base",), "combined": ("combined",)}
    return any(
        cell.name in kept.summaries
        and (cell.stressor in wanted[name] if name in wanted else cell.stressor not in ("base", "combined"))
        for cell in kept.cells
    )


def fill(text: str, made: Mapping[str, str]) -> str:
    """A README with its blocks replaced. Raises KeyError for a block that is not made here."""
    return BLOCK.sub(lambda found: f"{found[1]}{made[found[2]]}\n{found[3]}", text)


def read_kept(grid: Grid, summaries: Path = SUMMARIES) -> Kept:
    """The grid with the summaries that are there."""
    cells = grid.cells()
    return Kept(grid, tuple(cells), read_summaries(summaries, cells))


def main() -> int:
    """Write README and figures, or check the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if the README is not up to date; change nothing")
    chosen = parser.parse_args()
    kept = read_kept(read_grid())
    text = fill(README.read_text(), blocks(kept))
    if chosen.check:
        return int(text != README.read_text())
    README.write_text(text)
    from tools.study_figures import draw

    for name in ALTERNATIVES:
        if drawn(kept, name):
            print(draw(kept, name, FIGURES / f"{name}.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
