"""What a supervisor is given and what it answers: events, decisions, and the protocol of who carries them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Event:
    """Something that a backend has seen."""


@dataclass(frozen=True)
class Ended(Event):
    """A role's process, or the SLURM step of a kind of role, has ended."""

    name: str
    code: int
    """Its exit code; of a local process that a signal ended, minus the signal's number."""
    killed: bool = False
    """Whether a signal ended it: then it is the cause, and others may have failed because of it."""
    served: bool = True
    """Of a server that may be started again: whether it has answered its health check."""


@dataclass(frozen=True)
class Tick(Event):
    """Time has passed."""


@dataclass(frozen=True)
class StopRequested(Event):
    """USR1: the time limit is near, or the user wants the run to save itself and stop."""


@dataclass(frozen=True)
class Interrupted(Event):
    """TERM, or Ctrl-C."""

    number: int
    """The signal."""
    newest: int = 0
    """Step of the newest complete checkpoint."""


@dataclass(frozen=True)
class RolesEnded(Event):
    """No process of the attempt runs any more; what the run directory holds now."""

    newest: int = 0
    """Step of the newest complete checkpoint; 0 without any."""
    done: bool = False
    """Whether the file DONE is there."""
    replaced_by: int | None = None
    """Number of a newer attempt."""
    restarts: int = 0
    """Restarts after crashes so far, over all attempts."""


@dataclass(frozen=True)
class SlurmAnswered(Event):
    """slurmctld answers: what it says of the job, and whether a newer attempt runs by now."""

    requeues: bool = True
    """Whether the job may be queued again."""
    replaced_by: int | None = None
    preempted: bool = False
    """Whether SLURM needs the nodes for another job; the roles may have ended because of it."""
    ending: bool = False
    """Whether SLURM is ending the job, by scancel, for another job or at its limit."""


@dataclass(frozen=True)
class SlurmSilent(Event):
    """slurmctld has not answered for too long."""


@dataclass(frozen=True)
class NodesAnswered(Event):
    """Every node of the job was asked to run a program."""

    lost: bool
    """Whether one of them did not."""


@dataclass(frozen=True)
class RequeueRefused(Event):
    """SLURM was asked to queue the job again, and this process still runs."""


class Decision:
    """What the backend has to do."""


@dataclass(frozen=True)
class Print(Decision):
    """Write a sentence to the log."""

    text: str


@dataclass(frozen=True)
class Restart(Decision):
    """Start a role again."""

    name: str
    left: int
    """Times that are left after this one."""


@dataclass(frozen=True)
class SendStop(Decision):
    """Send USR1 to the trainers, once all of them can act on it."""


@dataclass(frozen=True)
class EndRoles(Decision):
    """End every process of the attempt and answer with RolesEnded."""


@dataclass(frozen=True)
class AskSlurm(Decision):
    """Wait for slurmctld and answer with SlurmAnswered or SlurmSilent."""


@dataclass(frozen=True)
class AskNodes(Decision):
    """Let every node run a program and answer with NodesAnswered."""


@dataclass(frozen=True)
class Explain(Decision):
    """Write the end of a role's log, and one sentence: role, place and reason."""

    name: str
    code: int


@dataclass(frozen=True)
class CountRestart(Decision):
    """Record one restart after a crash in the run directory."""

    reason: str


@dataclass(frozen=True)
class Requeue(Decision):
    """Have SLURM queue the job again, which ends this process; answer with RequeueRefused where it does not."""


@dataclass(frozen=True)
class Exit(Decision):
    """End with this code."""

    code: int


@dataclass(frozen=True)
class Watched:
    """One process, or one SLURM step, that is watched."""

    name: str
    """`trainer-0`; of a step the kind: `trainer`."""
    restarts: int = 0
    """Times that it is started again when it is lost while another of its kind runs."""

    @property
    def kind(self) -> str:
        """`trainer` of `trainer-0`."""
        return self.name.partition("-")[0]


class Backend(Protocol):
    """Where the processes of an attempt run."""

    def observe(self) -> list[Event]:
        """What has happened since the last call."""
        ...

    def perform(self, decision: Decision) -> list[Event]:
        """Carry out a decision; returns what is known afterwards."""
        ...

    def pause(self) -> None:
        """Wait until it is time to look again."""
        ...
