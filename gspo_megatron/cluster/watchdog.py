"""Ends an attempt that makes no progress: reports which rank is behind, and where every role is.

Each trainer rank keeps a file of its own in the run directory up to date from a thread, so a process that is stopped,
or a node that is gone, shows by its silence. A rank that is overdue looks at the others first: as long as one of them
makes progress (rank 0 sees responses come in while the others wait for it), the run is not stuck. When none does, a
mark in the same directory asks the roles of every node for their stacks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from gspo_megatron.cluster.attempts import replacement
from gspo_megatron.cluster.exit_codes import FAILED
from gspo_megatron.run_dir import RunDir

STALLED = "stalled"
"""File of the heartbeat directory: its presence asks every role for its stacks."""
INTERVAL = 2.0
"""Seconds between two looks."""
SILENT = 5
"""A rank that has not written for this many intervals is stopped or gone."""
FACTOR = 5.0
"""A stage may take this many times its longest duration so far."""
SHORTEST, FIRST = 120.0, 7200.0
"""Least limit, seconds; and the limit of a stage that was never finished before."""
STACKS = signal.SIGUSR2
"""Has a process that a role started write its stacks, whatever its interpreter is busy with."""
STACKS_SECONDS = 0.2
"""What it may take to write them, before the next one is asked."""


@dataclass(slots=True)
class Beat:
    """What one rank reports about itself."""

    stage: str
    """The stage it is in: `train`."""
    entered: int
    """Stages it has entered so far; the ranks enter the same ones."""
    at: float
    """When it last made progress, seconds since 1970."""
    written: float
    """When it wrote this."""


class Pulse:
    """How far this rank is: the log reports the stages to it, progress bars what happens within one."""

    def __init__(self) -> None:
        self.longest: dict[str, float] = {}
        self._open: list[tuple[str, float]] = [("start", time.time())]
        self._entered = 0
        self._at = time.time()

    def enter(self, stage: str) -> None:
        """A stage begins."""
        self._entered += 1
        self._at = time.time()
        self._open.append((stage, self._at))

    def leave(self) -> None:
        """The innermost stage is done."""
        stage, began = self._open.pop()
        self._at = time.time()
        self.longest[stage] = max(self.longest.get(stage, 0.0), self._at - began)

    def beat(self) -> None:
        """Something was finished within the stage."""
        self._at = time.time()

    def limit(self) -> float:
        """Seconds that this rank may go without progress."""
        longest = self.longest.get(self._open[-1][0])
        return FIRST if longest is None else max(SHORTEST, FACTOR * longest)

    def read(self) -> Beat:
        """The present state."""
        return Beat(self._open[-1][0], self._entered, self._at, time.time())


class Watchdog(threading.Thread):
    """The thread of one trainer rank."""

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world: int,
        pulse: Pulse,
        interval: float = INTERVAL,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        super().__init__(daemon=True)
        self.directory, self.rank, self.pulse, self.interval, self._end = (
            RunDir(run_dir).heartbeat,
            rank,
            pulse,
            interval,
            end,
        )
        self.directory.mkdir(parents=True, exist_ok=True)
        self.world = world
        self._path(rank).unlink(missing_ok=True)
        (self.directory / STALLED).unlink(missing_ok=True)

    def run(self) -> None:
        """Look until the process ends."""
        while True:
            mine = self.pulse.read()
            _replace(self._path(self.rank), json.dumps(asdict(mine)))
            if (self.directory / STALLED).exists():
                dump_stacks(f"trainer-{self.rank}")
                return
            replaced = replacement(self.directory.parent)
            if replaced is not None:
                print(f"{replaced}; this one ends", file=sys.stderr, flush=True)
                self._end(FAILED)
                return
            if time.time() - mine.at > self.pulse.limit() and self._nobody_makes_progress():
                self._alarm(mine)
                return
            time.sleep(self.interval)

    def _nobody_makes_progress(self) -> bool:
        return time.time() - max(beat.at for beat in self.read().values()) > self.pulse.limit()

    def read(self) -> dict[int, Beat]:
        """What every rank last reported."""
        paths = {rank: self._path(rank) for rank in range(self.world)}
        return {rank: Beat(**json.loads(path.read_text())) for rank, path in paths.items() if path.exists()}

    def _alarm(self, mine: Beat) -> None:
        (self.directory / STALLED).touch()
        dump_stacks(f"trainer-{self.rank}")
        print(blame(self.read(), time.time(), self.interval), file=sys.stderr, flush=True)
        # The other roles see the mark within an interval and write their stacks before they are ended.
        time.sleep(2 * self.interval)
        self._end(FAILED)

    def _path(self, rank: int) -> Path:
        return self.directory / f"trainer-{rank}.json"


def follow(run_dir: Path, name: str, interval: float = INTERVAL) -> None:
    """Have a role that is no trainer write its stacks, and those of the processes that it started, when a trainer
    finds that the run makes no progress."""

    mark = RunDir(run_dir).heartbeat / STALLED

    def look() -> None:
        for awaited in (False, True):  # a mark of an earlier attempt stays until the trainers have started
            while mark.exists() is not awaited:
                time.sleep(interval)
        dump_stacks(name)
        ask_children(name)

    threading.Thread(target=look, daemon=True).start()


def answer_for_stacks() -> None:
    """Let this process write its stacks when the role that started it asks."""
    faulthandler.register(STACKS, sys.stderr, all_threads=True)


def ask_children(name: str) -> None:
    """Have the processes below this one write their stacks, those that know how to."""
    for pid in descendants(os.getpid()):
        try:
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace").strip()
            if int(status["SigCgt"], 16) >> (STACKS - 1) & 1:
                # One that is stopped has no way to answer, which says it all.
                print(f"stacks of {name}, process {pid} {title}, {status['State']}:", file=sys.stderr, flush=True)
                os.kill(pid, STACKS)
                time.sleep(STACKS_SECONDS)
        except (FileNotFoundError, ProcessLookupError):
            continue


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they started."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for known in found:
        found += sorted(parents.get(known, []))
    return found[1:]


def blame(beats: dict[int, Beat], now: float, interval: float) -> str:
    """One sentence: which rank is behind, or that all wait in one stage."""
    idle = now - max(beat.at for beat in beats.values())
    silent = {rank: beat for rank, beat in beats.items() if now - beat.written > SILENT * interval}
    furthest = max(beat.entered for beat in beats.values())
    behind = silent or {rank: beat for rank, beat in beats.items() if beat.entered < furthest}
    if not behind:
        stages = sorted({beat.stage for beat in beats.values()})
        return (
            f"no progress for {idle:.0f} s: every trainer rank is in {', '.join(stages)}; "
            "the logs of the roles hold the stacks"
        )
    rank, beat = min(behind.items(), key=lambda entry: (entry[1].entered, entry[1].at))
    why = (
        f"is silent since {now - beat.written:.0f} s"
        if rank in silent
        else f"is {furthest - beat.entered} stages behind"
    )
    return (
        f"no progress for {idle:.0f} s: trainer-{rank} {why}, in {beat.stage}; this attempt ends, "
        "the run goes on from its newest checkpoint"
    )


def dump_stacks(name: str) -> None:
    """Write the stack of every thread of this process to its log."""
    print(f"stacks of {name}:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.rename(path)
