"""Who failed first, and what follows: restart a server, end the attempt, requeue, or finish.

One state machine for one machine and for a SLURM job. It starts, sends and reads nothing: events go in, decisions come
out, and the time is an argument. `local_backend.py` and `slurm_backend.py` make the events and carry out the decisions.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from gspo_megatron.cluster.end_words import not_queued_sentence, say_done, say_resume
from gspo_megatron.cluster.events import (
    AskNodes,
    AskSlurm,
    Backend,
    CountRestart,
    Decision,
    Ended,
    EndRoles,
    Event,
    Exit,
    Explain,
    Interrupted,
    NodesAnswered,
    Print,
    Requeue,
    RequeueRefused,
    Restart,
    RolesEnded,
    SendStop,
    SlurmAnswered,
    SlurmSilent,
    StopRequested,
    Tick,
    Watched,
)
from gspo_megatron.cluster.exit_codes import BY_SIGNAL, FAILED, OK, STOPPED

TRAINER = "trainer"


@dataclass(frozen=True)
class Rules:
    """What differs between one machine and a SLURM job."""

    settle: float
    """Seconds between the first end and the verdict: a killed role takes others with it."""
    run_dir: str = ""
    queue: bool = False
    """Whether a SLURM job can be requeued. Then exit codes of 0 prove nothing: only DONE does."""
    attempt: int = 1
    started_from: int = 0
    """Step of the checkpoint that this attempt started from."""
    grace: float = float("inf")
    """Seconds from a stop request to the end of the attempt."""
    resend: float = float("inf")
    """Seconds between two sends of the stop request."""
    max_restarts: int = 0
    resume: str = ""
    """Command that resumes the run."""
    leader: str = TRAINER
    """Kind of role whose good end is the end of the attempt."""
    extend: str = ""
    """Command that extends a finished run."""


class Phase(Enum):
    """Where an attempt is."""

    RUNNING = "running"
    SETTLING = "settling"
    ENDING = "ending"
    ASKING_SLURM = "asking slurm"
    ASKING_NODES = "asking nodes"
    REQUEUING = "requeuing"


def may_restart(left: int, served: bool, has_peer: bool = True) -> bool:
    """Whether a server that ended is started again: another one serves meanwhile, and this one has served."""
    return left > 0 and served and has_peer


class Supervisor:
    """The state of one attempt."""

    def __init__(self, roles: Sequence[Watched], rules: Rules) -> None:
        self.roles, self.rules, self.phase = roles, rules, Phase.RUNNING
        self._left = {role.name: role.restarts for role in roles}
        self._fresh: list[Ended] = []
        self._ended: dict[str, Ended] = {}
        self._failures: list[Ended] = []
        self._stop_at: float | None = None
        self._sent_at = 0.0
        self._settle_at = 0.0
        self._interrupted: int | None = None
        self._facts = RolesEnded()
        self._slurm = SlurmAnswered()

    def handle(self, event: Event, now: float) -> list[Decision]:
        """What follows from an event.

        Args:
            event: what was seen; one that does not matter in the present phase has no consequence.
            now: seconds on any clock that does not go back.
        """
        if isinstance(event, Interrupted):
            return self._interrupt(event)
        if self.phase in (Phase.RUNNING, Phase.SETTLING):
            return self._watch(event, now)
        if isinstance(event, RolesEnded) and self.phase is Phase.ENDING:
            return self._judge(event)
        if isinstance(event, SlurmAnswered) and self.phase is Phase.ASKING_SLURM:
            return self._judge_with_slurm(event)
        if isinstance(event, SlurmSilent) and self.phase is Phase.ASKING_SLURM:
            return [Print(f"it does not come back; to go on: {self.rules.resume}"), Exit(FAILED)]
        if isinstance(event, NodesAnswered) and self.phase is Phase.ASKING_NODES:
            return self._judge_failure(event.lost)
        if isinstance(event, RequeueRefused) and self.phase is Phase.REQUEUING:
            return [Print(not_queued_sentence(self.rules.resume)), Exit(STOPPED)]
        return []

    def _interrupt(self, event: Interrupted) -> list[Decision]:
        if self.phase is Phase.REQUEUING:
            # The end that SLURM brings now is the one that was asked for.
            return [Exit(STOPPED)]
        if self.rules.queue:
            return self._end_by_slurm(event.newest)  # which ends the roles itself
        if self.phase is Phase.ENDING:
            return []
        self._interrupted, self.phase = event.number, Phase.ENDING
        return [EndRoles()]

    def _end_by_slurm(self, newest: int) -> list[Decision]:
        why = "scancel, a lost node, or its limit"
        text = f"SLURM ends this attempt ({why}); {newest} is the newest complete checkpoint"
        return [Print(text), Exit(BY_SIGNAL + signal.SIGTERM)]

    def _watch(self, event: Event, now: float) -> list[Decision]:
        if isinstance(event, StopRequested):
            return self._stop(now)
        if isinstance(event, Ended):
            self._fresh.append(event)
        if not isinstance(event, Tick):
            return []
        decisions = self._look(now)
        return [*decisions, *self._keep_time(now)]

    def _keep_time(self, now: float) -> list[Decision]:
        if self.phase is Phase.SETTLING:
            return self._end_roles() if now >= self._settle_at else []
        if self._stop_at is None or self.phase is not Phase.RUNNING:
            return []
        if now - self._stop_at > self.rules.grace:
            self._failures = [Ended(TRAINER, STOPPED)]
            text = f"no checkpoint within {self.rules.grace:g} s; the unfinished step will be done again"
            return [Print(text), *self._end_roles()]
        if now - self._sent_at >= self.rules.resend:
            self._sent_at = now
            return [SendStop()]
        return []

    def _stop(self, now: float) -> list[Decision]:
        first = self._stop_at is None
        self._stop_at, self._sent_at = now if first else self._stop_at, now
        text = f"asked to stop (USR1); the trainers have {self.rules.grace:g} s for a checkpoint"
        return [*([Print(text)] if first and self.rules.queue else []), SendStop()]

    def _look(self, now: float) -> list[Decision]:
        """Judge together what has ended since the last tick: two servers that end at once are no peers."""
        fresh, self._fresh = self._fresh, []
        self._ended.update({end.name: end for end in fresh})
        if not self.rules.queue and self._leaders_ended_well():
            # The run is done or saved, whatever else ends in the same moment.
            self._failures = []
            return self._end_roles()
        decisions: list[Decision] = []
        for end in fresh:
            role = next(role for role in self.roles if role.name == end.name)
            left = self._left[role.name]
            if self.phase is Phase.RUNNING and may_restart(left, end.served, self._has_peer(role)):
                self._left[role.name] -= 1
                del self._ended[role.name]
                decisions.append(Restart(role.name, self._left[role.name]))
            elif role.kind != self.rules.leader or end.code not in (OK, STOPPED):
                self._failures.append(end)
        if self.phase is Phase.RUNNING and (self._failures or (self.rules.queue and self._ended)):
            self.phase, self._settle_at = Phase.SETTLING, now + self.rules.settle
        return decisions

    def _leader_codes(self) -> list[int | None]:
        """Exit codes of the trainers, or of what leads instead; None = it runs."""
        ends = [self._ended.get(role.name) for role in self.roles if role.kind == self.rules.leader]
        return [None if end is None else end.code for end in ends]

    def _leaders_ended_well(self) -> bool:
        return all(code in (OK, STOPPED) for code in self._leader_codes())

    def _has_peer(self, role: Watched) -> bool:
        return any(
            other.kind == role.kind and other.name != role.name and other.name not in self._ended
            for other in self.roles
        )

    def _end_roles(self) -> list[Decision]:
        self.phase = Phase.ENDING
        return [EndRoles()]

    def culprit(self) -> Ended:
        """The end that is the reason: trainers that stopped as asked, else the first killed role, else the first."""
        stopped = [end for end in self._ended.values() if end.name == TRAINER and end.code == STOPPED]
        killed = [end for end in self._failures if end.killed]
        return [*stopped, *killed, *self._failures, *self._ended.values()][0]

    def _judge(self, facts: RolesEnded) -> list[Decision]:
        self._facts = facts
        if facts.replaced_by is not None:
            return self._leave(facts.replaced_by)
        if not self.rules.queue:
            return self._judge_here()
        if facts.done:
            return [*say_done(self.rules.run_dir, self.rules.extend), Exit(OK)]
        self.phase = Phase.ASKING_SLURM
        return [AskSlurm()]

    def _judge_here(self) -> list[Decision]:
        go_on = say_resume(self._facts.newest, self.rules.resume)
        if (number := self._interrupted) is not None:
            return [Print(f"ended by {signal.Signals(number).name}"), *go_on, Exit(BY_SIGNAL + number)]
        if self._failures:
            culprit = self.culprit()
            return [*go_on, Explain(culprit.name, culprit.code), Exit(FAILED)]
        stopped = STOPPED in self._leader_codes()
        return [*go_on, Exit(STOPPED)] if stopped else [*say_done("", self.rules.extend), Exit(OK)]

    def _leave(self, newer: int) -> list[Decision]:
        return [Print(f"attempt {self.rules.attempt} was replaced by attempt {newer}; this one ends"), Exit(FAILED)]

    def _judge_with_slurm(self, answer: SlurmAnswered) -> list[Decision]:
        self._slurm = answer
        if answer.replaced_by is not None:
            return self._leave(answer.replaced_by)
        culprit, newest = self.culprit(), self._facts.newest
        # Without a newer checkpoint the job would be queued again and again, and never get further.
        if (culprit.name, culprit.code) == (TRAINER, STOPPED) and newest > self.rules.started_from:
            text = f"attempt {self.rules.attempt} stopped as asked; step {newest} is checkpointed"
            return [Print(text), *self._requeue()]
        if answer.ending:
            return self._end_by_slurm(newest)
        if answer.preempted:
            # Not the run's fault, whatever code its roles ended with: no restart is counted.
            text = f"SLURM preempts this job; {newest} is the newest complete checkpoint"
            return [Print(text), *self._requeue()]
        # Asked after every failure: it takes until SLURM misses a node, and it would start the job there again.
        self.phase = Phase.ASKING_NODES
        return [AskNodes()]

    def _judge_failure(self, node_lost: bool) -> list[Decision]:
        culprit, rules, facts = self.culprit(), self.rules, self._facts
        explanation = Explain(culprit.name, culprit.code)
        progress = f"a newer checkpoint exists (step {facts.newest})" if facts.newest > rules.started_from else ""
        reason = "a node is lost" if node_lost else progress
        if reason and facts.restarts < rules.max_restarts:
            if not self._slurm.requeues:
                return [explanation, *self._requeue()]
            text = f"restart {facts.restarts + 1} of at most {rules.max_restarts}, because {reason}"
            return [explanation, CountRestart(reason), Print(text), *self._requeue()]
        used_up = (
            f"{rules.max_restarts} restarts are used up (GSPO_MAX_RESTARTS; remove {rules.run_dir}/logs/restarts to "
            "allow as many again)"
        )
        no_progress = f"there is no newer checkpoint than step {rules.started_from}, so it would fail the same way"
        # The explanation comes last, so that the log ends with the reason.
        return [Print(f"not restarted: {used_up if reason else no_progress}"), explanation, Exit(FAILED)]

    def _requeue(self) -> list[Decision]:
        if not self._slurm.requeues:
            return [Print(not_queued_sentence(self.rules.resume)), Exit(STOPPED)]
        self.phase = Phase.REQUEUING
        return [Requeue()]


def supervise(supervisor: Supervisor, backend: Backend) -> int:
    """Run an attempt to its end; returns the exit code."""
    while True:
        events = deque([*backend.observe(), Tick()])
        while events:
            for decision in supervisor.handle(events.popleft(), time.monotonic()):
                if isinstance(decision, Exit):
                    return decision.code
                events.extend(backend.perform(decision))
        backend.pause()
