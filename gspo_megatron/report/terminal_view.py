"""`gspo watch` in the terminal: how far the run is, what it waits for, its servers, its last numbers, its warnings."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gspo_megatron.config import RecipeError
from gspo_megatron.metric_rows import RowReader, by_step
from gspo_megatron.models import load_resolved
from gspo_megatron.report.metric_names import NAMES
from gspo_megatron.report.page_data import group_warnings
from gspo_megatron.report.panels import number
from gspo_megatron.report.run_state import SILENT_SECONDS, WAITS, RankState, RunState, duration, read_state
from gspo_megatron.run_dir import RunDir
from gspo_megatron.types import printable

LOOK_SECONDS = 2.0
SHOWN = (
    "eval/accuracy", "reward_mean", "answer_length", "truncated", "clip_fraction_sequences", "log_s_p99", "grad_norm",
    "mismatch_k3", "token_entropy", "experts/load_max_over_mean", "staleness_mean", "canary_largest",
)  # fmt: skip
"""Metrics of the table."""
BACK = 10
"""Rows between the two values of a metric that are shown."""
COLOURS = {"finished": "green", "running": "cyan", "stopped": "yellow"}
SEVERITIES = {"error": "red", "warning": "yellow"}


class Watch:
    """Looks at one run directory again and again; whatever is missing at a moment is said, and looked for again."""

    def __init__(self, run_dir: Path) -> None:
        self.run = RunDir(run_dir)
        self._metrics, self._warnings = RowReader(self.run.metrics), RowReader(self.run.warnings)
        self._steps: int | None = None

    def look(self) -> tuple[RunState | None, RenderableType]:
        """The state of the run, None where it cannot be read now, and what to show."""
        if not self.run.path.is_dir():
            return None, Text(f"{self.run.path} is not there (removed, or not mounted); looking again")
        try:
            rows, warnings = by_step(self._metrics.read()), self._warnings.read()
            self._steps = self._steps or _read_steps(self.run)
        except (RecipeError, OSError) as error:
            return None, Text(f"{self.run.path} cannot be read: {error}; looking again", style="red")
        state = read_state(self.run, rows, self._steps)
        return state, Group(*_parts(self.run, state, rows, warnings))


def watch(run_dir: Path, console: Console) -> None:
    """Show a run until it is finished or Ctrl-C is pressed; once, where the output is no terminal."""
    view = Watch(run_dir)
    state, shown = view.look()
    if not console.is_terminal:
        console.print(shown)
        return
    with Live(shown, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while state is None or state.kind != "finished":
            time.sleep(LOOK_SECONDS)
            state, shown = view.look()
            live.update(shown, refresh=True)


def _read_steps(run: RunDir) -> int | None:
    return load_resolved(run.recipe).trainer.max_steps if run.recipe.is_file() else None


def _parts(
    run: RunDir, state: RunState, rows: Sequence[Mapping[str, Any]], warnings: Sequence[Mapping[str, Any]]
) -> Iterator[RenderableType]:
    yield Text.assemble((printable(run.path.name), "bold"), "  ", (state.text, COLOURS[state.kind]))
    if state.steps:
        bar = Table.grid()
        bar.add_row(ProgressBar(total=state.steps, completed=min(state.step, state.steps), width=60))
        yield bar
    if state.seconds_per_step is not None:
        yield Text(f"{duration(state.seconds_per_step)} a step{_rate(rows)}")
    if state.kind != "finished":
        yield from (Text(line) for line in describe_ranks(state.ranks))
    if state.servers:
        yield _servers(state)
    if rows:
        yield _numbers(rows)
    for one in group_warnings(warnings):
        when = f"step {one['first']}" if one["count"] == 1 else f"first at step {one['first']}, {one['count']} times"
        line = printable(f"{one['severity']} [{one['code']}] {when}: {one['message']}; {one['fix']}")
        yield Text(line, style=SEVERITIES.get(one["severity"], "dim"))


def _rate(rows: Sequence[Mapping[str, Any]]) -> str:
    last = rows[-1]
    seconds, tokens = last.get("seconds/step"), last.get("rollout_tokens")
    return f", {number(tokens / seconds)} trained tokens a second" if seconds and tokens else ""


def describe_ranks(ranks: Sequence[RankState]) -> list[str]:
    """What the trainer ranks wait for: ranks in one stage on one line; those that are silent by name."""
    if not ranks:
        return ["no trainer rank has reported yet"]
    silent = [one for one in ranks if one.silent >= SILENT_SECONDS]
    stages: dict[str, list[RankState]] = defaultdict(list)
    for one in ranks:
        if one not in silent:
            stages[one.stage].append(one)
    lines = []
    for stage, members in sorted(stages.items(), key=lambda item: -len(item[1])):
        who = members[0].rank if len(members) == 1 else f"{len(members)} trainer ranks"
        since = duration(max(max(one.since for one in members), 0.0))
        lines.append(f"{who}: {WAITS.get(stage, stage)}; last progress {since} ago")
    if silent:
        names = ", ".join(one.rank for one in silent[:8]) + (" ..." if len(silent) > 8 else "")
        lines.append(f"silent for {duration(min(one.silent for one in silent))} and more: {names}")
    return lines


def _servers(state: RunState) -> Table:
    table = Table("server", "tokens/s", "running", "waiting", "KV cache", "logged", box=None, padding=(0, 2, 0, 0))
    for one in state.servers:
        counts = (f"{one.tokens_per_second:,.0f}", str(one.running), str(one.waiting), f"{one.kv:.1%}")
        table.add_row(one.name, *counts, f"{duration(max(one.age, 0.0))} ago")
    return table


def _numbers(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The last value of each metric, and the one `BACK` recorded rows before."""
    table = Table("metric", "last", "step", f"{BACK} rows before", box=None, padding=(0, 2, 0, 0))
    for name in SHOWN:
        found = [(row["step"], row[name]) for row in rows if name in row]
        if found:
            before = number(found[-1 - BACK][1]) if len(found) > BACK else ""
            table.add_row(NAMES[name], number(found[-1][1]), str(found[-1][0]), before)
    return table
