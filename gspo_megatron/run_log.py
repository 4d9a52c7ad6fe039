"""The log of a run: metrics.jsonl, TensorBoard, metric sinks, one line a step on the terminal, progress bars.

Names and meanings of the metrics: README.md beside this file and objective/README.md.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gspo_megatron.cluster.shared_files import replace_text
from gspo_megatron.cluster.watchdog import Pulse
from gspo_megatron.metric_rows import read_rows, read_warnings
from gspo_megatron.run_dir import RunDir
from gspo_megatron.sinks.sink_threads import Sinks
from gspo_megatron.types import Finding, printable

PLAIN_INTERVAL = 15.0
"""Seconds between two progress lines where the output is no terminal."""
EVALUATED = ("accuracy", "mean_reward", "mean_length", "unscored", "problems", "answers", "temperature")
"""What a row keeps of an evaluation: its results, and how it sampled."""
UNSAID = ("step", "check", "stop")
"""Parts of a step that its line leaves out: the whole, and questions that take no time."""
LONGEST_EXAMPLE = 200
"""Characters that the terminal shows of a question or a response."""
BAR_COLUMNS = (
    TextColumn("{task.description:>10}"),
    BarColumn(bar_width=30),
    MofNCompleteColumn(),
    TextColumn("{task.fields[rate]:>8}"),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)


def one_line(text: str) -> str:
    """A text for one line of a terminal: blanks and line ends as one blank, its end cut off where it is long."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST_EXAMPLE else f"{text[:LONGEST_EXAMPLE]} ..."


class Bar:
    """The progress of one phase; `update` takes how much is done in total, and of how much if that is known by now."""

    def __init__(self, name: str, total: int, log: RunLog) -> None:
        self._name, self._total, self._log = name, total, log
        self._start = self._printed = time.monotonic()
        self._done = 0
        self._task = log.bars.add_task(name, total=total, rate="") if log.live else None

    def update(self, done: int, total: int | None = None) -> None:
        """Show that `done` of the total are finished."""
        self._total = total or self._total
        if done != self._done:
            self._done = done
            self._log.pulse.beat()
        if not self._log.owns_terminal:
            return
        now = time.monotonic()
        rate = done / max(now - self._start, 1e-6)
        if self._task is not None:
            self._log.bars.update(self._task, completed=done, total=self._total, rate=f"{rate:.1f}/s")
        elif now - self._printed > PLAIN_INTERVAL and done:
            self._printed = now
            left = (self._total - done) / rate
            self._log.say(f"{self._name}: {done}/{self._total}, {rate:.1f}/s, {left:.0f} s left")

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._task is not None:
            self._log.bars.remove_task(self._task)


class RunLog:
    """The log of one trainer rank. Only the rank that owns the terminal writes anything.

    Usage: `with log:` around the run, `with log.step(n):` around a step; within it `add` collects the step's row.
    """

    def __init__(self, run_dir: Path, owns_terminal: bool, sinks: Sinks | None = None) -> None:
        self.run_dir, self.owns_terminal, self._sinks = RunDir(run_dir), owns_terminal, sinks or Sinks([])
        self.console = Console(quiet=not owns_terminal, highlight=False, soft_wrap=True)
        self.live = owns_terminal and self.console.is_terminal
        self.bars = Progress(*BAR_COLUMNS, console=self.console, transient=True)
        self.pulse = Pulse()
        self._row: dict[str, float] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._between = False
        """Whether a step was written: what is timed between two steps belongs to the later one."""
        self._board: Any = None
        self._number = 0

    def __enter__(self) -> Self:
        # Remove a line that a crash cut off before the next one is appended to it.
        self.rewind(sys.maxsize)
        if self.owns_terminal:
            self.run_dir.warnings.touch()  # without it nobody knows whether there was none
        self._open_board()
        if self.live:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.bars.stop()
        if self._board is not None:
            self._board.close()
        for finding in self._sinks.close():
            self.warn(finding)

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the seconds inside to `seconds/PART` of the step."""
        start = time.monotonic()
        self.pulse.enter(part)
        try:
            yield
        finally:
            self.pulse.leave()
            self._seconds[part] += time.monotonic() - start

    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator[Bar]:
        """A bar for one phase, with rate and time left; plain lines where the output is no terminal."""
        bar = Bar(name, total, self)
        try:
            yield bar
        finally:
            bar.close()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Collect a row, then write it to metrics.jsonl, TensorBoard and the terminal."""
        self._number = number
        if not self._between:
            self._seconds.clear()  # what comes before the first step belongs to none
        self._row = {}
        with self.time("step"):
            yield
        self._write(number)
        self._print(number)
        self._seconds.clear()
        self._between = True

    def add(self, values: Mapping[str, float]) -> None:
        """Put values into the step's row."""
        self._row |= values

    def row(self) -> dict[str, float]:
        """The step's row so far."""
        return dict(self._row)

    def say(self, text: str) -> None:
        """Print one line on the terminal."""
        self.console.print(text, markup=False)

    def warn(self, finding: Finding) -> None:
        """Print a named warning of the running job, and keep it with its step."""
        if finding.severity != "info":
            self.console.print(str(finding), markup=False, style="yellow")
        if self.owns_terminal:
            with self.run_dir.warnings.open("a") as file:
                file.write(json.dumps({"step": self._number, **asdict(finding)}) + "\n")

    def evaluation(self, step: int, found: Mapping[str, Any]) -> None:
        """Record a held-out evaluation in the step's row, or before the first step in a row of its own."""
        self.add({f"eval/{name}": found[name] for name in EVALUATED})
        if not self.owns_terminal:
            return
        self.say(f"eval {step:4d}  held-out accuracy {found['accuracy']:.3f}  length {found['mean_length']:.1f}")
        self.run_dir.examples.write_text(json.dumps(found["examples"], indent=1))
        if step == 0:
            self._write(0)

    def rewind(self, step: int) -> None:
        """Remove the rows and warnings after the step that the run resumes from, in TensorBoard too."""
        run = self.run_dir
        for file, read in ((run.metrics, read_rows), (run.warnings, read_warnings)):
            if self.owns_terminal and file.is_file():
                kept = [row for row in read(run.path) if row["step"] <= step]
                replace_text(file, "".join(json.dumps(row) + "\n" for row in kept))
        if self._board is not None:
            self._board.close()
            self._open_board(purge_step=step + 1)

    def finish(self) -> None:
        """Print responses to three problems and where everything is."""
        run = self.run_dir
        # Without evaluations there are no examples.
        for example in json.loads(run.examples.read_text()) if run.examples.is_file() else ():
            question, answer = (one_line(example[name]) for name in ("question", "answer_text"))
            self.say(f"  {question}  ->  {answer}  (reward {example['reward']:g})")
        self.say(f"plot {run.plot}, report {run.page}, metrics {run.metrics},")
        self.say(f"weights {run.final}, logs {run.logs}, TensorBoard files beside them")

    def _open_board(self, purge_step: int | None = None) -> None:
        """Start a TensorBoard file. It hides what earlier files hold from `purge_step` on."""
        if self.owns_terminal:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.run_dir.tensorboard), purge_step=purge_step)

    def _write(self, number: int) -> None:
        if not self.owns_terminal:
            return
        row = self._row | {f"seconds/{part}": seconds for part, seconds in self._seconds.items()}
        if self._sinks:
            row["sink_failures"] = self._sinks.failures
        with self.run_dir.metrics.open("a") as file:
            file.write(json.dumps({"step": number, **row}) + "\n")
        for name, value in row.items():
            self._board.add_scalar(name, value, number)
        self._board.flush()
        self._sinks.write(number, row)
        for finding in self._sinks.warnings():
            self.warn(finding)

    def _print(self, number: int) -> None:
        row = self._row
        parts = "  ".join(f"{part} {seconds:.1f}" for part, seconds in self._seconds.items() if part not in UNSAID)
        self.say(
            f"step {number:4d}  reward {row['reward_mean']:.3f}  length {row['answer_length']:.1f}  "
            f"clipped {row['clip_fraction_sequences']:.3f}  grad {row['grad_norm']:.2f}  "
            f"{self._seconds['step']:.1f} s ({parts})"
        )
