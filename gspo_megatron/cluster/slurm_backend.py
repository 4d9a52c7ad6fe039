"""The roles of one attempt as steps of a SLURM job: one srun for each kind of role.

What follows from an end is decided by `supervisor.py`. Runs on the batch node, with the standard library only.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from gspo_megatron.cluster import slurm_words
from gspo_megatron.cluster.attempts import (
    count_restarts,
    newest_checkpoint,
    read_attempt,
    read_bad_nodes,
    remove_key,
)
from gspo_megatron.cluster.events import (
    AskNodes,
    AskSlurm,
    CountRestart,
    Decision,
    Ended,
    EndRoles,
    Event,
    Explain,
    NodesAnswered,
    Print,
    Requeue,
    RequeueRefused,
    RolesEnded,
    SendStop,
    SlurmAnswered,
    SlurmSilent,
)
from gspo_megatron.cluster.exit_codes import STOPPED
from gspo_megatron.cluster.shared_files import read_shared, retry_stale
from gspo_megatron.cluster.slurm_allocation import Allocation
from gspo_megatron.cluster.slurm_commands import (
    await_answer,
    describe_job,
    is_ending,
    is_preempted,
    may_queue_again,
    queue_again,
)
from gspo_megatron.cluster.slurm_steps import Step, srun
from gspo_megatron.cluster.slurm_words import KILLED, NOT_CREATED, first_end, read_end
from gspo_megatron.run_dir import AttemptDir, RunDir

KINDS = ("rollout", "controller", "trainer")
"""In the order in which they are started and looked at: the end of a server takes the others with it."""
TASK_LINE = re.compile(r"^ *(?:\d+: *)?((?:trainer|rollout)-\d+(?:\.\d+)?|controller) on .*, process ", re.MULTILINE)
"""What launch/lib/task.py prints once it has the key and holds USR1 back; `--label` of srun puts a number in front."""
LOOK_SECONDS = 1.0
NODES_SECONDS = 40.0


@dataclass(frozen=True)
class Place:
    """The attempt and its files."""

    job: str
    """SLURM's id."""
    run_dir: Path
    attempt: Path
    """`RUN/logs/attempt_3`."""
    number: int
    allocation: Allocation
    """All nodes of the job."""
    trainer_ranks: int
    tasks: int
    """Processes of all roles."""

    @property
    def files(self) -> AttemptDir:
        """The files of the attempt."""
        return AttemptDir(self.attempt)

    @property
    def run(self) -> RunDir:
        """The files of the run."""
        return RunDir(self.run_dir)


class SlurmBackend:
    """The steps of one attempt."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.signals: list[Event] = []
        """What the handlers of this process have received."""
        self._steps: dict[str, subprocess.Popen[bytes]] = {}
        self._words: dict[str, BinaryIO] = {}
        """What srun has written about each step. Held open: people delete logs."""
        self._commands: dict[str, Sequence[str]] = {}
        self._refusals: dict[str, int] = {}
        """How often SLURM has not created a step."""
        self._reported: set[str] = set()
        self._started: set[str] = set()
        """Tasks that hold USR1 back and have read the key."""
        self._all_started = False
        self._began_with = newest_checkpoint(place.run_dir)

    def start(self, kind: str, command: Sequence[str]) -> None:
        """Start the step of a kind of role.

        What srun writes itself (which task of which node ended, and how) is kept apart from the tasks' output.
        """
        self._words[kind] = self.place.files.srun(kind).open("a+b")
        self._commands[kind] = command
        self._ask_for(kind)

    def _ask_for(self, kind: str) -> None:
        log = self._words[kind]
        self._steps[kind] = subprocess.Popen(self._commands[kind], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _is_asked_for_again(self, kind: str) -> bool:
        """Whether a step that has ended was never created, which is no fault of the run, and is started now."""
        refusals = len(NOT_CREATED.findall("\n".join(self._read_words(kind))))
        if refusals <= self._refusals.get(kind, 0) or refusals > slurm_words.CREATE_TRIES:
            return False
        self._refusals[kind] = refusals
        time.sleep(slurm_words.CREATE_SECONDS)
        self._ask_for(kind)
        return True

    def observe(self) -> list[Event]:
        """Signals that have come, and steps that have ended."""
        events, self.signals[:] = list(self.signals), []
        self._look_for_starts()
        ended = [kind for kind in KINDS if kind in self._steps and self._steps[kind].poll() is not None]
        for kind in ended:
            if kind not in self._reported and not self._is_asked_for_again(kind):
                self._reported.add(kind)
                killed = KILLED.search(first_end(self._read_words(kind))) is not None
                events.append(Ended(kind, self._code(kind), killed))
        # Of several codes srun returns the highest: the first rank that stops as asked gets the others killed.
        if ended and "trainer" not in self._reported and self._stopped_as_asked():
            self._reported.add("trainer")
            events.append(Ended("trainer", STOPPED))
        return events

    def perform(self, decision: Decision) -> list[Event]:
        """Carry out a decision."""
        if isinstance(decision, Print):
            print(f"gspo: {decision.text}", flush=True)
        elif isinstance(decision, SendStop):
            self._send_stop()
        elif isinstance(decision, EndRoles):
            self.end_steps()
            return [retry_stale(self._read_run_dir)]
        elif isinstance(decision, AskSlurm):
            return [self._await_slurm()]
        elif isinstance(decision, AskNodes):
            return [NodesAnswered(self._is_node_lost())]
        elif isinstance(decision, Explain):
            print(self.explain(decision.name, decision.code), flush=True)
        elif isinstance(decision, CountRestart):
            when = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
            self.place.run.logs.mkdir(exist_ok=True)
            with self.place.run.restarts.open("a") as file:
                file.write(f"{when} attempt {self.place.number}: {decision.reason}\n")
        elif isinstance(decision, Requeue):
            remove_key(self.place.attempt)
            return [self._queue_again()]
        return []

    def pause(self) -> None:
        """Wait a moment."""
        time.sleep(LOOK_SECONDS)

    def explain(self, kind: str, code: int) -> str:
        """The end of the log of a kind of role, then one sentence: kind, node and reason."""
        end = read_end(self._read_words(kind), code)
        log = self._log_of(kind, end.node)
        where = f" on {end.node}" if end.node else ""
        lines = [] if log is None else _lines(log)
        shown = "".join(f"  {kind}{where[3:]} | {line}\n" for line in lines[-15:])
        return f"{shown}gspo: {kind} failed{where}: {end.reason_by(lines)} (log: {log or self.place.attempt})"

    def _code(self, kind: str) -> int:
        return STOPPED if kind == "trainer" and self._stopped_as_asked() else self._steps[kind].returncode

    def _stopped_as_asked(self) -> bool:
        return any(f"exit code {STOPPED}" in line for line in self._read_words("trainer"))

    def _read_words(self, kind: str) -> list[str]:
        handle = self._words[kind].fileno()
        try:
            text = os.pread(handle, os.fstat(handle).st_size, 0)
        except OSError:  # deleted by another node
            return []
        return text.decode(errors="replace").splitlines()

    def _log_of(self, kind: str, node: str) -> Path | None:
        """The log of a kind of role on a node, or its newest; None for a step that could not start."""
        named = self.place.files.log(f"{kind}-{node}")
        logs = sorted(self.place.attempt.glob(f"{kind}-*.log"), key=lambda path: path.stat().st_mtime)
        return named if named in logs else (logs[-1] if logs else None)

    def _look_for_starts(self) -> None:
        """Which tasks have started. The key is taken away once all have: nobody reads it again.

        So it does not outlive an attempt whose script is killed. Where people have cleared the logs, a new checkpoint
        says that all have started.
        """
        if self._all_started:
            return
        for kind in KINDS:
            for path in self.place.attempt.glob(f"{kind}-*.log"):
                self._started.update(TASK_LINE.findall("\n".join(_lines(path))))
        if len(self._started) >= self.place.tasks or newest_checkpoint(self.place.run_dir) > self._began_with:
            self._all_started = True
            remove_key(self.place.attempt)

    def _send_stop(self) -> None:
        """USR1 to all trainer ranks, once each holds it back; earlier it would end one."""
        trainer, ready = self._steps.get("trainer"), sum(name.startswith("trainer") for name in self._started)
        if trainer is not None and (self._all_started or ready >= self.place.trainer_ranks):
            trainer.send_signal(signal.SIGUSR1)

    def end_steps(self) -> None:
        """End everything that was started, and wait for it."""
        for process in self._steps.values():
            process.terminate()
        for process in self._steps.values():
            process.wait()

    def _read_run_dir(self) -> RolesEnded:
        newest, restarts = newest_checkpoint(self.place.run_dir), count_restarts(self.place.run_dir)
        # Read after the roles have ended: where the network is gone that takes a minute, and the attempt that runs
        # elsewhere may be done by then.
        return RolesEnded(newest, self.place.run.done.is_file(), self._replaced_by(), restarts)

    def _replaced_by(self) -> int | None:
        try:
            newest = read_attempt(self.place.run_dir)
        except ValueError as error:
            print(f"gspo: {error}; attempt {self.place.number} goes on as the newest", flush=True)
            return None
        return newest.number if newest is not None and newest.number > self.place.number else None

    def _await_slurm(self) -> Event:
        """A slurmctld that restarts knows nothing of the nodes, and queues nothing."""
        return await_answer(self._ask_slurm) or SlurmSilent()

    def _ask_slurm(self) -> SlurmAnswered | None:
        record, replaced_by = describe_job(self.place.job), self._replaced_by()
        if not record and replaced_by is None:
            return None
        return SlurmAnswered(may_queue_again(record), replaced_by, is_preempted(record), is_ending(record))

    def _queue_again(self) -> RequeueRefused:
        queue_again(self.place.job, read_bad_nodes(self.place.run_dir))
        return RequeueRefused()

    def _is_node_lost(self) -> bool:
        """Whether a node of the job no longer runs even `true`."""
        if self.place.allocation.is_heterogeneous:
            return False
        allocation = self.place.allocation
        command = srun(Step("alive", allocation.hosts), ("true",), allocation)
        # What it says, "Killed" for example, is no line for the job's own log.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            return process.wait(NODES_SECONDS) != 0
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return True


def _lines(path: Path) -> list[str]:
    """Of a log, which people may delete at any moment."""
    with suppress(FileNotFoundError):
        return read_shared(path).splitlines()
    return []
