"""The roles of a run on this machine: started together, watched, ended together.

What follows from an end is decided by `supervisor.py`. When a role fails, its name and the end of its log are the last
lines. Only processes that were started here are ended, each with its own process group.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from gspo_megatron.cluster.attempts import newest_checkpoint
from gspo_megatron.cluster.child_processes import hear_of_ends
from gspo_megatron.cluster.end_words import restart_sentence
from gspo_megatron.cluster.events import (
    Decision,
    Ended,
    EndRoles,
    Event,
    Explain,
    Interrupted,
    Print,
    Restart,
    RolesEnded,
    SendStop,
    StopRequested,
    Watched,
)
from gspo_megatron.cluster.free_ports import LOOPBACK, free_ports, hold_ports
from gspo_megatron.cluster.hosts import Host, Ports, Spread, Task, evaluation_tasks, tasks
from gspo_megatron.cluster.scratch_directory import scratch_directory
from gspo_megatron.cluster.server_health import ServerHealth
from gspo_megatron.cluster.supervisor import TRAINER, Rules, Supervisor, supervise
from gspo_megatron.cluster.visible_devices import VARIABLE, Gpu, list_gpus, name_devices
from gspo_megatron.config.refusal import refuse
from gspo_megatron.config.schema import Recipe
from gspo_megatron.run_dir import AttemptDir

STOP = signal.SIGUSR1
"""Asks a run to save itself and to stop."""
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
SETTLE = 0.5
"""Seconds to wait after the first end: a killed role takes others with it; one ended by a signal is the cause."""
LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Role:
    """One process of the run."""

    name: str
    """`trainer-0`, `rollout-1`, `controller`."""
    command: tuple[str, ...]
    """Program and arguments; never a secret."""
    environment: dict[str, str] = field(default_factory=dict)
    """Added to this process's environment."""
    owns_terminal: bool = False
    """Its standard output goes to the terminal instead of its log."""
    restarts: int = 0
    """Times it is started again when it ends while another of its kind runs."""
    ports: tuple[int, ...] = ()
    """Ports of the loopback interface on which it listens."""


def plan_roles(recipe: Recipe, run_dir: Path, ranks: int) -> list[Role]:
    """The processes of a run on one machine: those of a job of one node, on ports that are free here."""
    return _plan(recipe, run_dir, ranks, tasks)


def plan_evaluation(recipe: Recipe, run_dir: Path) -> list[Role]:
    """The processes of an evaluation on this machine, on ports that are free here."""
    return _plan(recipe, run_dir, 1, evaluation_tasks)


def _plan(
    recipe: Recipe, run_dir: Path, ranks: int, list_tasks: Callable[[Recipe, Spread, Ports, Path], list[Task]]
) -> list[Role]:
    free = free_ports(2 + recipe.rollout.servers)
    ports, here = Ports(free[0], free[1], tuple(free[2:])), Host("localhost", LOOPBACK)
    visible = list_gpus()
    over = Spread((here,), ranks, (here,), recipe.rollout.servers, len(visible))
    key = {"GSPO_JOB_KEY": secrets.token_hex(16)}
    # Servers may have an environment of their own, as on a cluster (launch/local.sh).
    programs = {"rollout": os.environ.get("GSPO_ROLLOUT_PYTHON", sys.executable)}
    return [
        Role(
            task.name,
            (programs.get(task.kind, sys.executable), *task.arguments),
            {**key, **task.environment, **_own_devices(task, visible)},
            owns_terminal=task.name in ("trainer-0", "evaluator"),
            restarts=task.restarts,
            ports=task.ports,
        )
        for task in list_tasks(recipe, over, ports, run_dir)
    ]


def _own_devices(task: Task, visible: Sequence[Gpu]) -> dict[str, str]:
    """What a task sees of the GPUs, if not all. Raises RecipeError where there are too few."""
    places = task.environment.get(VARIABLE)
    try:
        return {} if places is None else {VARIABLE: name_devices(places, visible)}
    except ValueError as error:
        message, _, fix = str(error).partition("; ")
        raise refuse("too-few-gpus", "rollout.servers", message, fix) from None


def run_roles(
    roles: Sequence[Role], log_dir: Path, *, leader: str = TRAINER, resume: str = "", extend: str = ""
) -> int:
    """Start the roles, wait for the trainer ranks, or for what leads instead, end everything.

    Args:
        roles: of the run.
        log_dir: `logs/attempt_N` of the run directory.
        leader: kind of role whose good end is the end.
        resume: command that resumes the run.
        extend: command that trains it further when it is finished.

    Returns:
        0 when every trainer rank ended well; STOPPED when they saved themselves because they were asked to stop; 130 or
        143 after Ctrl-C or SIGTERM; 1 when a role failed.
    """
    hear_of_ends()
    log_dir.mkdir(parents=True, exist_ok=True)
    with scratch_directory() as scratch:
        backend = LocalBackend([_with_scratch(role, scratch) for role in roles], log_dir)
        return _supervise(backend, roles, Rules(settle=SETTLE, leader=leader, resume=resume, extend=extend))


def _with_scratch(role: Role, scratch: dict[str, str]) -> Role:
    is_server = role.name.startswith("rollout")
    return replace(role, environment={**scratch, **role.environment}) if is_server else role


def _supervise(backend: LocalBackend, roles: Sequence[Role], rules: Rules) -> int:
    handlers = {signal.SIGINT: backend.interrupt, signal.SIGTERM: backend.interrupt, STOP: backend.request_stop}
    # A process is born with what its parent holds back, so a trainer that still imports does not die of a stop request.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {STOP})
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with hold_ports(LOOPBACK, [port for role in roles for port in role.ports]):
            for role in roles:
                backend.start(role.name)
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            watched = [Watched(role.name, role.restarts) for role in roles]
            return supervise(Supervisor(watched, rules), backend)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        backend.end()
        for number, handler in before.items():
            signal.signal(number, handler)


class LocalBackend:
    """The processes of one attempt on this machine."""

    def __init__(self, roles: Sequence[Role], log_dir: Path) -> None:
        self._roles = {role.name: role for role in roles}
        self._log_dir = log_dir
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: set[str] = set()
        self._health: dict[str, ServerHealth] = {}
        self._signals: list[Event] = []

    def interrupt(self, number: int, _: FrameType | None) -> None:
        """Handler of Ctrl-C and SIGTERM."""
        self._signals.append(Interrupted(number))

    def request_stop(self, number: int, _: FrameType | None) -> None:
        """Handler of USR1."""
        self._signals.append(StopRequested())

    def start(self, name: str) -> None:
        """Start a role, with its output appended to its log."""
        role = self._roles[name]
        with (self._log_dir / f"{role.name}.log").open("ab") as log:
            self._running[role.name] = subprocess.Popen(
                role.command,
                env={**os.environ, **role.environment},
                stdin=subprocess.DEVNULL,
                stdout=None if role.owns_terminal else log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends the others in order
            )
        self._ended.discard(role.name)
        if role.restarts:
            self._health[name] = ServerHealth(LOOPBACK, role.ports[0])

    def observe(self) -> list[Event]:
        """Signals that have come, and roles that have ended."""
        events, self._signals = self._signals, []
        for name, process in self._running.items():
            if name not in self._ended and process.poll() is not None:
                self._ended.add(name)
                served = name not in self._health or self._health[name].served
                events.append(Ended(name, process.returncode, killed=process.returncode < 0, served=served))
            elif name in self._health and name not in self._ended:
                self._health[name].look()
        return events

    def perform(self, decision: Decision) -> list[Event]:
        """Carry out a decision."""
        if isinstance(decision, Restart):
            print(f"gspo: {restart_sentence(decision.name, decision.left)}", file=sys.stderr, flush=True)
            _end_group(self._running[decision.name])  # what it may have left behind, its port among that
            self.start(decision.name)
        elif isinstance(decision, SendStop):
            for name, process in self._running.items():
                if name.startswith("trainer"):
                    process.send_signal(STOP)
        elif isinstance(decision, EndRoles):
            self.end()
            return [RolesEnded(newest_checkpoint(AttemptDir(self._log_dir).run.path))]
        elif isinstance(decision, Explain):
            self._explain(decision.name, decision.code)
        elif isinstance(decision, Print):
            print(f"gspo: {decision.text}", file=sys.stderr, flush=True)
        return []

    def pause(self) -> None:
        """Wait a moment."""
        time.sleep(LOOK_SECONDS)

    def end(self) -> None:
        """End what is left, its children included; processes that were not started here are never touched."""
        for process in self._running.values():
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            _signal_group(process, signal.SIGKILL)
            process.wait()

    def _explain(self, name: str, code: int) -> None:
        log = self._log_dir / f"{name}.log"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if code < 0:
            said = f"killed by {signal.Signals(-code).name}"
        else:
            said = lines[-1].strip() if lines else f"it wrote nothing and ended with code {code}"
        for line in lines[-12:]:
            print(f"  {name} | {line}", file=sys.stderr)
        print(f"gspo: {name} failed: {said} (log: {log})", file=sys.stderr, flush=True)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what an ended process has left in its group, and wait until it is gone."""
    deadline = time.monotonic() + GRACE
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)
            time.sleep(LOOK_SECONDS)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
