"""The roles of a run on this machine: started together, watched, ended together.

The first role that fails ends the rest; its name and the end of its log are the last lines. Only processes that were
started here are ended, each with its own process group.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from gspo_megatron.cluster.exit_codes import BY_SIGNAL, STOPPED
from gspo_megatron.cluster.hosts import Host, Ports, Spread, tasks
from gspo_megatron.cluster.machines import count_gpus
from gspo_megatron.config.schema import Recipe

LOOPBACK = "127.0.0.1"
STOP = signal.SIGUSR1
"""Asks a run to save itself and to stop."""
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
SETTLE = 0.5
"""Seconds to wait after the first end: a killed role takes others with it; one ended by a signal is the cause."""


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


class Interrupted(Exception):
    """The user or the system asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.code = BY_SIGNAL + number


def plan_roles(recipe: Recipe, run_dir: Path, ranks: int) -> list[Role]:
    """The processes of a run on one machine: those of a job of one node, on ports that are free here."""
    free = free_ports(2 + recipe.rollout.servers)
    ports, here = Ports(free[0], free[1], tuple(free[2:])), Host("localhost", LOOPBACK)
    over = Spread((here,), ranks, (here,), recipe.rollout.servers, count_gpus())
    key = {"GSPO_JOB_KEY": secrets.token_hex(16)}
    # Servers may have an environment of their own, as on a cluster (launch/local.sh).
    programs = {"rollout": os.environ.get("GSPO_ROLLOUT_PYTHON", sys.executable)}
    return [
        Role(
            task.name,
            (programs.get(task.kind, sys.executable), *task.arguments),
            {**key, **task.environment},
            owns_terminal=task.name == "trainer-0",
            restarts=task.restarts,
        )
        for task in tasks(recipe, over, ports, run_dir)
    ]


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nothing listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def run_roles(roles: Sequence[Role], log_dir: Path) -> int:
    """Start the roles, wait for the trainer ranks, end everything.

    Returns:
        0 when every trainer rank ended well; STOPPED when they saved themselves because they were asked to stop; 130 or
        143 after Ctrl-C or SIGTERM; 1 when a role failed.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    handlers = {signal.SIGINT: _interrupt, signal.SIGTERM: _interrupt, STOP: _pass_on(running)}
    # A process is born with what its parent holds back, so a trainer that still imports does not die of a stop request.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {STOP})
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        for role in roles:
            running[role.name] = _start(role, log_dir)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        failed = _wait(running, roles, log_dir)
    except Interrupted as interruption:
        reason, code = str(interruption), interruption.code
    else:
        ended = max(process.returncode or 0 for name, process in running.items() if name.startswith("trainer"))
        reason, code = (_explain(failed, running[failed].returncode, log_dir), 1) if failed else ("", ended)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        _end(running)
        for number, handler in before.items():
            signal.signal(number, handler)
    if reason:
        print(f"gspo: {reason}", file=sys.stderr, flush=True)
    return code


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


def _pass_on(running: dict[str, subprocess.Popen[bytes]]) -> Callable[[int, FrameType | None], None]:
    """A handler that tells the trainer ranks to save and stop."""

    def tell(number: int, _: FrameType | None) -> None:
        for name, process in running.items():
            if name.startswith("trainer"):
                process.send_signal(number)

    return tell


def _start(role: Role, log_dir: Path) -> subprocess.Popen[bytes]:
    with (log_dir / f"{role.name}.log").open("ab") as log:
        return subprocess.Popen(
            role.command,
            env={**os.environ, **role.environment},
            stdin=subprocess.DEVNULL,
            stdout=None if role.owns_terminal else log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches this process only, which then ends the others in order
        )


def _wait(running: dict[str, subprocess.Popen[bytes]], roles: Sequence[Role], log_dir: Path) -> str | None:
    """Name of the role that failed first, or None once every trainer rank has ended well."""
    left = {role.name: role.restarts for role in roles}
    while True:
        for role in roles:
            if left[role.name] and running[role.name].poll() is not None and _has_peer(role, running):
                left[role.name] -= 1
                said = f"gspo: {role.name} ended and is started again; {left[role.name]} more times"
                print(said, file=sys.stderr, flush=True)
                _signal_group(running[role.name], signal.SIGKILL)  # what it may have left behind
                running[role.name] = _start(role, log_dir)
        ended = {name: process.poll() for name, process in running.items()}
        trainers = [code for name, code in ended.items() if name.startswith("trainer")]
        if all(code in (0, STOPPED) for code in trainers):
            return None
        if any(_is_failure(name, code) for name, code in ended.items()):
            time.sleep(SETTLE)
            failures = {name: p.returncode for name, p in running.items() if _is_failure(name, p.poll())}
            first = [name for name, code in ended.items() if _is_failure(name, code)]
            by_signal = [name for name, code in failures.items() if code < 0]
            return next((name for name in by_signal if name in first), None) or (by_signal or first)[0]
        time.sleep(0.05)


def _has_peer(role: Role, running: dict[str, subprocess.Popen[bytes]]) -> bool:
    """Whether another role of the same kind runs."""
    kind = role.name.rpartition("-")[0]
    return any(
        name != role.name and name.rpartition("-")[0] == kind and process.poll() is None
        for name, process in running.items()
    )


def _is_failure(name: str, code: int | None) -> bool:
    return code is not None and (code not in (0, STOPPED) or not name.startswith("trainer"))


def _explain(name: str, code: int, log_dir: Path) -> str:
    log = log_dir / f"{name}.log"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code < 0:
        said = f"killed by {signal.Signals(-code).name}"
    else:
        said = lines[-1].strip() if lines else f"it said nothing and ended with code {code}"
    for line in lines[-12:]:
        print(f"  {name} | {line}", file=sys.stderr)
    return f"{name} failed: {said} (log: {log})"


def _end(running: dict[str, subprocess.Popen[bytes]]) -> None:
    """End what is left, its children included; processes that were not started here are never touched."""
    for process in running.values():
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for process in running.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
