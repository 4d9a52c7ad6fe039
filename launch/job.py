"""One attempt of a run as a SLURM job: `launch/gspo_moe.sh` becomes this (`python -m launch.job DIRECTORY ARGUMENTS`).

Runs on the batch node with the standard library of Python 3.9 or newer; what needs the recipe runs in the trainer's
environment (`launch/lib/plan.py`). Without a SLURM job it becomes `launch/local.sh`.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import BinaryIO, NoReturn

from gspo_megatron.cluster.attempts import count_restarts, newest_checkpoint, read_bad_nodes, remove_key
from gspo_megatron.cluster.child_processes import hear_of_ends
from gspo_megatron.cluster.end_words import not_queued_sentence
from gspo_megatron.cluster.events import CountRestart, Exit, Interrupted, Print, StopRequested, Watched
from gspo_megatron.cluster.exit_codes import BY_SIGNAL, FAILED, OK, REFUSED, STOPPED
from gspo_megatron.cluster.slurm_allocation import Allocation, drop_options
from gspo_megatron.cluster.slurm_backend import KINDS, Place, SlurmBackend
from gspo_megatron.cluster.slurm_commands import (
    describe_job,
    exclusion_fault,
    is_preempted,
    may_queue_again,
    plain_names,
    queue_again,
    running_jobs,
    task_name,
)
from gspo_megatron.cluster.supervisor import Rules, Supervisor, supervise
from gspo_megatron.run_dir import AttemptDir, RunDir
from launch.lib.attempt import claim_attempt, wait_for_slurm, write_key
from launch.lib.granted_job import HOME, Job, find_job, print_commands
from launch.lib.job_arguments import Arguments, read_arguments
from launch.lib.plan_request import Refused, ask_plan, role_step
from launch.lib.preflight_steps import SickNodes, check_nodes
from launch.lib.settings import Settings

SETTLE = 2.0
"""Seconds after the first end of a step in which srun writes about the others."""
ANSWER_SECONDS = 3.0
"""SLURM kills a script that has not ended 30 s after SIGTERM, or KillWait."""
BY_USERS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
"""Signals that SLURM does not send by itself."""
RESEND = 5.0
"""Seconds between two sends of a stop request: earlier ones may have come before a rank could act on them."""


class SlurmEnds(BaseException):
    """TERM: SLURM ends this job."""


class UserEnds(BaseException):
    """Ctrl-C in a shell of salloc, or another signal that somebody sends to this script alone."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(words: Sequence[str]) -> int:
    """Entry. Exit codes: gspo_megatron/cluster/exit_codes.py."""
    hear_of_ends()
    try:
        arguments = read_arguments(words[1:], Path(words[0]))
        job_id = os.environ.get("SLURM_JOB_ID", "")
        if not job_id and not arguments.drawing:
            become_local(arguments, Path(words[0]))
        settings = read_settings(Path(words[0]))
        if arguments.drawing:
            return draw(arguments, settings)
        return Attempt(arguments, settings, job_id).run()
    except Refused as error:
        # Whoever was asked for the plan has printed its own sentences.
        if str(error):
            print(f"gspo: {error}", file=sys.stderr, flush=True)
        return REFUSED


def read_settings(called_in: Path) -> Settings:
    """The site's settings. Raises Refused."""
    try:
        return Settings.read(HOME, called_in)
    except ValueError as error:
        raise Refused(str(error)) from None


def become_local(arguments: Arguments, called_in: Path) -> NoReturn:
    """Without SLURM: all roles on this machine."""
    local = str(HOME / "launch" / "local.sh")
    os.chdir(called_in)
    os.execv(local, [local, str(HOME / arguments.recipe), *arguments.overrides])


def draw(arguments: Arguments, settings: Settings) -> int:
    """Say what would run where, and with which commands; nothing is started."""
    width = len(str(arguments.nodes))
    hosts = tuple(f"node{number:0{width}d}" for number in range(1, arguments.nodes + 1))
    job = Job("JOB", hosts, arguments.gpus)
    settings = replace(settings, allocation=Allocation(hosts, gpus=job.gpus))
    plan = ask_plan("draw", settings, job.id, job.hosts, job.gpus, (arguments.recipe, *arguments.overrides))
    for kind in KINDS:
        print(shlex.join(role_step(kind, plan, settings, RunDir(plan.run_dir).attempt_logs(1).path)))
    return OK


class Attempt:
    """One attempt of a run: this process, from its start to its end."""

    def __init__(self, arguments: Arguments, settings: Settings, job_id: str) -> None:
        self.arguments, self.settings = arguments, settings
        self.job_id = job_id
        self.name = job_id
        """What names this job alone to SLURM's commands."""
        self._stop_requested = False
        self._backend: SlurmBackend | None = None
        self._supervisor: Supervisor | None = None
        self._attempt: Path | None = None
        self._lock: BinaryIO | None = None
        """Holds the run directory until this process ends."""
        self._resume = ""
        self._queued = False

    def run(self) -> int:
        """Plan, check the nodes, start the roles, watch them. Returns the exit code."""
        signal.signal(signal.SIGUSR1, self._on_usr1)
        signal.signal(signal.SIGTERM, self._on_term)
        for number in BY_USERS:
            # A shell or nohup has its reasons to ignore one.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_user)
        try:
            return self._run_or_explain()
        except SlurmEnds:
            return STOPPED if self._queued else self._end_by_slurm()
        except UserEnds as end:
            return self._end_by_user(end.number)
        finally:
            # The whole script is one attempt: what it started is gone when it ends, and so is the key.
            if self._attempt is not None:
                remove_key(self._attempt)

    def _run_or_explain(self) -> int:
        try:
            return self._run()
        except Refused as error:
            # A step that a preemption has ended may have been the preflight's.
            # No answer does not mean that it is not.
            if self._attempt is None or not is_preempted(wait_for_slurm(lambda: describe_job(self.name) or None)):
                raise
            print("gspo: SLURM preempts this job before its roles have started", *error.args, flush=True)
            return self._queue_again(())
        except Exception as error:  # whatever it is, the roles must not stay behind, nor the user without a command
            return self._fail(error)

    def _queue_again(self, without: Sequence[str]) -> int:
        """Queue the job again, which ends this process; returns where SLURM does not."""
        self._queued = True
        queue_again(self.name, without)
        print(f"gspo: {not_queued_sentence(self._resume)}", flush=True)
        return REFUSED

    def _go_elsewhere(self, place: Place, max_restarts: int) -> int:
        """Queue the job again without the nodes whose hardware must not be used."""
        bad, used = plain_names(read_bad_nodes(place.run_dir)), count_restarts(place.run_dir)
        record = wait_for_slurm(lambda: describe_job(place.job) or None)
        why = exclusion_fault(record, bad)
        if why or used >= max_restarts or not may_queue_again(record):
            because = f", because {why}" if why else ""
            print(f"gspo: not queued again{because}; to go on without {','.join(bad)} (--exclude): {self._resume}")
            return REFUSED
        print(f"gspo: restart {used + 1} of at most {max_restarts}, without {','.join(bad)}", flush=True)
        SlurmBackend(place).perform(CountRestart("hardware that must not be used"))
        return self._queue_again(bad)

    def _fail(self, error: Exception) -> int:
        """Say where the script itself failed and how to go on, and end the roles."""
        if self._backend is not None:
            self._backend.end_steps()
        if isinstance(error, OSError) and self._owns(error.filename):
            # A file of the run, which people and file systems change: no fault of ours.
            print(
                f"gspo: {error.filename} cannot be used ({error.strerror}); correct that, then: {self._go_on}",
                flush=True,
            )
            return FAILED
        traceback.print_exception(type(error), error, error.__traceback__)
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(HOME))]
        where = f" at {Path(frames[-1].filename).relative_to(HOME)}:{frames[-1].lineno}" if frames else ""
        words = " ".join(str(error).split())
        print(
            f"gspo: the job script failed{where}: {type(error).__name__}: {words}; to go on: {self._go_on}", flush=True
        )
        return FAILED

    @property
    def _go_on(self) -> str:
        """What to type."""
        return self._resume or "submit the same command again"

    @property
    def _run_dir(self) -> Path | None:
        """The run, once it is known."""
        return None if self._attempt is None else AttemptDir(self._attempt).run.path

    def _owns(self, file: object) -> bool:
        """Whether a file is one of the run directory."""
        run_dir = self._run_dir
        return run_dir is not None and file is not None and run_dir in Path(os.fsdecode(str(file))).parents

    def _run(self) -> int:
        given = dict(os.environ)
        drop_options(os.environ)
        self.name = task_name(self.job_id) if "SLURM_ARRAY_TASK_ID" in os.environ else self.job_id
        count = os.environ.get("SLURM_RESTART_COUNT", "")
        start = int(count) + 1 if count.isdigit() else 1
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        host = socket.gethostname().partition(".")[0]
        print(f"gspo: job {self.job_id}, start {start}, on {host}, {now}", flush=True)
        job, settings = find_job(self.job_id, self.name, self.settings, given)
        more = (f"placement.rollout_nodes={job.apart}",) if job.apart else ()
        arguments = (self.arguments.recipe, *self.arguments.overrides, *more)
        plan = ask_plan("open", settings, job.id, job.hosts, job.gpus, arguments, wait_for_slurm(running_jobs))
        if plan.done:
            print(f"gspo: {plan.run_dir} holds a finished run (DONE); a larger trainer.max_steps trains it further")
            return OK
        attempt = self._attempt = plan.attempt
        self._lock = claim_attempt(plan, job.id, is_first=start == 1)
        resume = self._resume = print_commands(job, plan, arguments, attempt, settings.called_in)
        tasks = [plan.steps["trainer"].tasks, sum(plan.steps[kind].tasks for kind in KINDS)]
        place = Place(self.name, plan.run_dir, attempt, plan.number, settings.allocation, *tasks)
        try:
            check_nodes(plan, settings, attempt)
        except SickNodes:
            return self._go_elsewhere(place, settings.max_restarts)
        write_key(attempt)
        started_from = newest_checkpoint(plan.run_dir)
        if started_from:
            print(f"gspo: goes on after step {started_from}", flush=True)
        backend = self._backend = SlurmBackend(place)
        rules = Rules(
            SETTLE, str(plan.run_dir), True, plan.number, started_from, settings.grace, RESEND,
            settings.max_restarts, resume, extend=f"{resume} trainer.max_steps=NUMBER",
        )  # fmt: skip
        self._supervisor = Supervisor([Watched(kind) for kind in KINDS], rules)
        if self._stop_requested:
            backend.signals.append(StopRequested())
        for kind in KINDS:
            backend.start(kind, role_step(kind, plan, settings, attempt, log=True))
        return supervise(self._supervisor, backend)

    def _on_usr1(self, _: int, __: FrameType | None) -> None:
        if self._backend is not None:
            self._backend.signals.append(StopRequested())
        self._stop_requested = True

    def _on_term(self, _: int, __: FrameType | None) -> None:
        # SLURM sends it more than once, and to everything that this process has started.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._backend is None or not is_preempted(describe_job(self.name, timeout=ANSWER_SECONDS)):
            raise SlurmEnds
        # Only announced: the roles have the partition's grace time. What they end with is judged as a preemption.
        signal.signal(signal.SIGTERM, self._on_term)

    def _on_user(self, number: int, _: FrameType | None) -> None:
        for other in BY_USERS:
            signal.signal(other, signal.SIG_IGN)
        raise UserEnds(number)

    def _end_by_user(self, number: int) -> int:
        """End the roles, which a signal to this script alone leaves running in the allocation."""
        if self._backend is not None:
            self._backend.end_steps()
        print(f"gspo: ended by {signal.Signals(number).name}; to go on: {self._go_on}", flush=True)
        return BY_SIGNAL + number

    def _end_by_slurm(self) -> int:
        supervisor = self._supervisor or Supervisor([], Rules(SETTLE, queue=True))
        newest = newest_checkpoint(self._run_dir) if self._run_dir is not None else 0
        for decision in supervisor.handle(Interrupted(signal.SIGTERM, newest), 0.0):
            if isinstance(decision, Print):
                print(f"gspo: {decision.text}", flush=True)
            elif isinstance(decision, Exit):
                return decision.code
        return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
