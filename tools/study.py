"""Run the grid of the study, cell by cell: `make study`, or `python tools/study.py [CELL ...]`.

    python tools/study.py                              every cell that has no summary, in the order of the grid
    python tools/study.py 'gspo-*-s0' --list           which cells these are, and what became of them
    python tools/study.py grpo-lr-3e-4-s2 --again      one cell anew

CELL is a name or a pattern as of a shell. A cell is `gspo train recipes/study/base.yaml` with overrides. Its run lies
in RUNS/CELL/attempt_K, and recipes/study/summaries/CELL.json keeps what the tables need. A cell that was interrupted or
failed is named at the end. The next call goes on from its newest checkpoint, or begins another attempt where cell or
package have changed since; nothing is removed. A cell for which this checkout has no recipe is left out, with the
reason. `tools/study_tables.py` makes the tables.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gspo_megatron.metric_rows import read_rows
from gspo_megatron.run_dir import NumberedName, RunDir
from tools.study_grid import FOLDER, ROOT, SUMMARIES, Cell, Grid, fault_of, read_grid
from tools.study_summary import read_summaries, summarize, write_summary

ATTEMPT = NumberedName("attempt", 1)
NOISE = "GSPO_STUDY_ROUTER_NOISE"
"""Read by tools/router_noise/sitecustomize.py, which the path of the run's processes then holds."""
NOT_FINITE = "gradients that are not finite"
"""What the trainer says when it ends a run for them."""


@dataclass(slots=True)
class Study:
    """A grid and its places."""

    grid: Grid
    runs: Path
    summaries: Path
    longest: float = 14400.0
    """Seconds after which a cell is ended, and has failed."""
    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)

    def command(self, cell: Cell, place: Path) -> list[str]:
        """The command line of a cell."""
        recipe = FOLDER / self.grid.recipe
        places = (f"run.directory={place}", f"cold_start.cache={self.runs / 'cold_start'}")
        return [sys.executable, "-m", "gspo_megatron.cli", "train", str(recipe), *cell.overrides, *places]

    def finished_attempt(self, cell: Cell) -> Path | None:
        """The record of a finished attempt of this very cell whose summary was not written."""
        for place in reversed(ATTEMPT.find(self.runs / cell.name).values()):
            record = place.with_suffix(".json")
            facts = json.loads(record.read_text()) if RunDir(place).done.is_file() and record.is_file() else {}
            if facts.get("digest") == cell.digest:
                return record
        return None

    def open_attempt(self, cell: Cell, facts: Mapping[str, Any], again: bool) -> tuple[Path, dict[str, Any]]:
        """Place and record of the unfinished attempt of this very cell with this very package, or of a new one."""
        places = ATTEMPT.find(self.runs / cell.name)
        newest = places[max(places)] if places else None
        if newest is not None and not again and not RunDir(newest).done.is_file():
            record = newest.with_suffix(".json")
            known = json.loads(record.read_text()) if record.is_file() else {}
            if all(known.get(key) == facts[key] for key in ("digest", "package")):
                return newest, known
        place = self.runs / cell.name / ATTEMPT.name(max(places, default=0) + 1)
        place.mkdir(parents=True)
        return place, {**facts, "starts": 0, "wall_seconds": 0.0, "processor_seconds": 0.0}

    def run_cell(self, cell: Cell, again: bool = False) -> str:
        """Run a cell and write its summary, or only the summary of a finished attempt. Returns what went wrong."""
        record = None if again else self.finished_attempt(cell)
        if record is not None:
            return self.keep(cell, record, 0)
        now = {"digest": cell.digest, "date": datetime.now(UTC).date().isoformat(), **code_facts()}
        place, facts = self.open_attempt(cell, now, again)
        record = place.with_suffix(".json")
        facts["starts"] += 1
        record.write_text(json.dumps(facts))
        code, usage = self.execute(self.command(cell, place), place.with_suffix(".log"), environment_of(cell))
        record.write_text(json.dumps({**facts, **{name: round(facts[name] + usage[name], 1) for name in usage}}))
        return "was interrupted" if self.stopping.is_set() else self.keep(cell, record, code)

    def keep(self, cell: Cell, record: Path, code: int) -> str:
        """Write the summary of an attempt that ended. Returns what went wrong, if nothing can be kept."""
        place, log = record.with_suffix(""), record.with_suffix(".log")
        diverged = code == 1 and NOT_FINITE in (log.read_text(errors="replace") if log.is_file() else "")
        facts = {key: value for key, value in json.loads(record.read_text()).items() if key != "digest"}
        if code and not diverged:
            return f"ended with exit code {code} after {facts['wall_seconds']:.0f} s; {log} says why"
        ended = NOT_FINITE if diverged else "finished"
        write_summary(self.summaries, cell, facts, summarize(read_rows(place), self.grid.collapse, ended))
        return ""

    def execute(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> tuple[int, dict[str, float]]:
        """Run a command to its end, or until the study stops; returns its exit code and what it took."""
        began = time.monotonic()
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environment}, stdout=out, stderr=out, start_new_session=True
            )
        self.processes.add(process)
        clock = threading.Timer(self.longest, end, [process])
        clock.start()
        try:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = code = os.waitstatus_to_exitcode(status)
        finally:
            clock.cancel()
            self.processes.discard(process)
        return code, {"wall_seconds": time.monotonic() - began, "processor_seconds": used.ru_utime + used.ru_stime}

    def stop(self) -> None:
        """End the cells that run."""
        self.stopping.set()
        for process in list(self.processes):
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a run to end: its launcher ends the other processes."""
    if process.returncode is None:
        os.kill(process.pid, signal.SIGTERM)


def environment_of(cell: Cell) -> dict[str, str]:
    """What is set for the processes of a cell: they run the code of this checkout."""
    noise = [str(ROOT / "tools" / "router_noise")] if cell.router_noise else []
    path = os.pathsep.join([*noise, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, **({NOISE: str(cell.router_noise)} if cell.router_noise else {})}


def code_facts() -> dict[str, str]:
    """Commit, tree of the package, and machine."""

    def ask(*question: str) -> str:
        found = subprocess.run(["git", *question], cwd=ROOT, capture_output=True, text=True)
        return found.stdout.strip()

    hardware = f"{os.cpu_count()} cores, {platform.machine()}, no GPU"
    return {"commit": ask("rev-parse", "--short", "HEAD"), "package": ask("rev-parse", "--short", "HEAD:gspo_megatron"),
            "hardware": hardware}  # fmt: skip


def chosen_cells(grid: Grid, patterns: Sequence[str]) -> list[Cell]:
    """Cells of which a pattern is the name; all without patterns. Raises ValueError for a pattern that names none."""
    cells = grid.cells()
    for pattern in patterns:
        if not fnmatch.filter([cell.name for cell in cells], pattern):
            raise ValueError(f"no cell of the grid is called {pattern}; --list prints all of them")
    return [cell for cell in cells if not patterns or any(fnmatch.fnmatch(cell.name, one) for one in patterns)]


def run_cells(study: Study, cells: Sequence[Cell], jobs: int, again: bool) -> Iterator[tuple[Cell, str]]:
    """Run cells, `jobs` at a time, in their order; yields each that was tried, and what went wrong."""

    def one(cell: Cell) -> str:
        return "was not started" if study.stopping.is_set() else study.run_cell(cell, again)

    with ThreadPoolExecutor(jobs) as pool:
        waiting = {cell: pool.submit(one, cell) for cell in cells}
        try:
            yield from ((cell, future.result()) for cell, future in waiting.items())
        except BaseException:
            study.stop()
            raise


def main() -> int:
    """Run or list cells. Exit 1 if one failed, 2 for a name that is not in the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="CELL", help="names or patterns; all without")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; half the cores at most (1)")
    parser.add_argument("--again", action="store_true", help="run cells that have a summary")
    parser.add_argument("--list", action="store_true", help="print the cells and what became of them")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="where the runs lie (runs/study)")
    parser.add_argument("--summaries", type=Path, default=SUMMARIES, help="where the summaries are kept")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    study = Study(read_grid(), chosen.runs.resolve(), chosen.summaries.resolve())
    try:
        cells = chosen_cells(study.grid, chosen.cells)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    known = read_summaries(study.summaries, cells)
    faults = {cell.name: fault for cell in cells if cell.name not in known and (fault := fault_of(study.grid, cell))}
    if chosen.list:
        for cell in cells:
            print(f"{cell.name:32}", known.get(cell.name, {}).get("ended") or faults.get(cell.name) or "not run")
        return 0
    wanted = [cell for cell in cells if cell.name not in faults and (chosen.again or cell.name not in known)]
    failed = 0
    for cell, fault in run_cells(study, wanted, max(1, chosen.jobs), chosen.again):
        failed += bool(fault)
        print(f"{cell.name}: {fault or 'kept'}", flush=True)
    for name, fault in faults.items():
        print(f"{name}: not yet: {fault}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
