"""The supervisor's decisions, as a table of cases: what happened when, and what follows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_megatron.cluster.events import (
    AskNodes,
    AskSlurm,
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
from gspo_megatron.cluster.exit_codes import FAILED, OK, STOPPED
from gspo_megatron.cluster.supervisor import Rules, Supervisor, may_restart

HERE = Rules(settle=0.5)
SLURM = Rules(
    settle=2.0, run_dir="RUN", queue=True, attempt=2, started_from=4, grace=240.0, resend=5.0, max_restarts=3,
    resume="sbatch again",
)  # fmt: skip
ROLES = [Watched(name) for name in ("rollout-0", "controller", "trainer-0", "trainer-1")]
SERVERS = [Watched("rollout-0", 2), Watched("rollout-1", 2), Watched("controller"), Watched("trainer-0")]
STEPS = [Watched(kind) for kind in ("rollout", "controller", "trainer")]
TICK = Tick()
ENDS = "SLURM ends this attempt (scancel, a lost node, or its limit); 6 is the newest complete checkpoint"
REPLACED = Print("attempt 2 was replaced by attempt 3; this one ends")
STUCK = Print("not restarted: there is no newer checkpoint than step 4, so it would fail the same way")
PREEMPTED = Print("SLURM preempts this job; 4 is the newest complete checkpoint")
NO_REQUEUE = Print("SLURM does not queue this job again; to go on: sbatch again")
NOT_QUEUED = Print("SLURM does not queue this job again; to go on: sbatch again")
ASKED = Print("asked to stop (USR1); the trainers have 240 s for a checkpoint")
USED_UP = Print(
    "not restarted: 3 restarts are used up (GSPO_MAX_RESTARTS; remove RUN/logs/restarts to allow as many again)"
)


def restarts(number: int, reason: str) -> list[Decision]:
    return [CountRestart(reason), Print(f"restart {number} of at most 3, because {reason}"), Requeue()]


Script = list[tuple[float, Event]]
STOPS: Script = [(0, StopRequested()), (9, Ended("trainer", STOPPED)), (9, TICK), (11, TICK)]
CRASHES: Script = [(9, Ended("trainer", 1)), (9, TICK), (11, TICK)]
SERVER_DIES: Script = [(9, Ended("rollout", 1)), (9, TICK), (11, TICK)]
STOPPED_AT_6 = [Print("attempt 2 stopped as asked; step 6 is checkpointed")]

HERE_CASES: dict[str, tuple[list[Watched], Script, list[Decision]]] = {
    "nothing happens": (ROLES, [(0, TICK), (900, TICK)], []),
    "trainers end well": (
        ROLES,
        [(1, Ended("trainer-0", 0)), (1, TICK), (2, Ended("trainer-1", 0)), (2, TICK), (3, RolesEnded())],
        [EndRoles(), Exit(OK)],
    ),
    "trainers stop as asked": (
        ROLES,
        [(1, StopRequested()), (2, Ended("trainer-0", 85)), (2, Ended("trainer-1", 85)), (2, TICK), (3, RolesEnded())],
        [SendStop(), EndRoles(), Exit(STOPPED)],
    ),
    "one trainer ends, one goes on": (ROLES, [(1, Ended("trainer-0", 0)), (1, TICK), (9, TICK)], []),
    "a second request is passed on too": (
        ROLES, [(1, StopRequested()), (2, StopRequested())], [SendStop(), SendStop()],
    ),
    "no grace on one machine": (ROLES, [(1, StopRequested()), (9999, TICK)], [SendStop()]),
    "a trainer fails": (
        ROLES,
        [(1, Ended("trainer-1", 3)), (1, TICK), (1.4, TICK), (1.6, TICK), (2, RolesEnded())],
        [EndRoles(), Explain("trainer-1", 3), Exit(FAILED)],
    ),
    "the controller ends with 0": (
        ROLES,
        [(1, Ended("controller", 0)), (1, TICK), (1.5, TICK), (2, RolesEnded())],
        [EndRoles(), Explain("controller", 0), Exit(FAILED)],
    ),
    "the only server ends with 0": (
        ROLES,
        [(1, Ended("rollout-0", 0)), (1, TICK), (1.5, TICK), (2, RolesEnded())],
        [EndRoles(), Explain("rollout-0", 0), Exit(FAILED)],
    ),
    "the killed role is the cause, not the one it took along": (
        ROLES,
        [(1, Ended("trainer-0", 1)), (1, TICK), (1.2, Ended("trainer-1", -9, True)), (1.2, TICK),
         (1.5, TICK), (2, RolesEnded())],
        [EndRoles(), Explain("trainer-1", -9), Exit(FAILED)],
    ),
    "a lost server comes back while another serves": (
        SERVERS,
        [(1, Ended("rollout-1", -9, True)), (1, TICK), (2, Ended("rollout-1", 0)), (2, TICK)],
        [Restart("rollout-1", 1), Restart("rollout-1", 0)],
    ),
    "a server that was lost too often": (
        SERVERS,
        [*[(n, e) for n in (1, 2, 3) for e in (Ended("rollout-1", 1), TICK)], (4, TICK), (5, RolesEnded())],
        [Restart("rollout-1", 1), Restart("rollout-1", 0), EndRoles(), Explain("rollout-1", 1), Exit(FAILED)],
    ),
    "two servers that end at once have no peer": (
        SERVERS,
        [(1, Ended("rollout-0", 1)), (1, Ended("rollout-1", 1)), (1, TICK), (2, TICK), (2, RolesEnded())],
        [EndRoles(), Explain("rollout-0", 1), Exit(FAILED)],
    ),
    "a server fails in the moment in which the trainers end well": (
        ROLES,
        [(1, Ended("rollout-0", -9, True)), (1, Ended("trainer-0", 0)), (1, Ended("trainer-1", 0)), (1, TICK),
         (2, RolesEnded())],
        [EndRoles(), Exit(OK)],
    ),
    "trainers stop as asked just after a server was lost": (
        ROLES,
        [(1, Ended("rollout-0", 1)), (1, TICK), (1.2, Ended("trainer-0", 85)), (1.2, Ended("trainer-1", 85)),
         (1.2, TICK), (2, RolesEnded())],
        [EndRoles(), Exit(STOPPED)],
    ),
    "a server that is lost when the trainers end is not started again": (
        SERVERS,
        [(1, Ended("rollout-1", 1)), (1, Ended("trainer-0", 0)), (1, TICK), (2, RolesEnded())],
        [EndRoles(), Exit(OK)],
    ),
    "Ctrl-C": (ROLES, [(1, Interrupted(2)), (2, RolesEnded())], [EndRoles(), Print("ended by SIGINT"), Exit(130)]),
    "TERM": (ROLES, [(1, Interrupted(15)), (2, RolesEnded())], [EndRoles(), Print("ended by SIGTERM"), Exit(143)]),
    "Ctrl-C while the roles end": (
        ROLES,
        [(1, Ended("controller", 1)), (1, TICK), (2, TICK), (2, Interrupted(2)), (3, RolesEnded())],
        [EndRoles(), Explain("controller", 1), Exit(FAILED)],
    ),
}  # fmt: skip

SLURM_CASES: dict[str, tuple[Rules, Script, list[Decision]]] = {
    "DONE is success whatever srun returns": (
        SLURM,
        [*CRASHES, (12, RolesEnded(6, done=True))],
        [EndRoles(), Print("DONE; results are in RUN"), Exit(OK)],
    ),
    "srun's 0 without DONE is a failure": (
        SLURM,
        [(9, Ended("trainer", 0)), (9, TICK), (11, TICK), (12, RolesEnded(4)),
         (12, SlurmAnswered()), (13, NodesAnswered(False))],
        [EndRoles(), AskSlurm(), AskNodes(), STUCK, Explain("trainer", 0), Exit(FAILED)],
    ),
    "a crash after a newer checkpoint": (
        SLURM,
        [*CRASHES, (12, RolesEnded(6, restarts=1)), (12, SlurmAnswered()), (13, NodesAnswered(False))],
        [EndRoles(), AskSlurm(), AskNodes(), Explain("trainer", 1), *restarts(2, "a newer checkpoint exists (step 6)")],
    ),
    "a crash without a newer checkpoint": (
        SLURM,
        [*CRASHES, (12, RolesEnded(4)), (12, SlurmAnswered()), (13, NodesAnswered(False))],
        [EndRoles(), AskSlurm(), AskNodes(), STUCK, Explain("trainer", 1), Exit(FAILED)],
    ),
    "restarts are used up": (
        SLURM,
        [*CRASHES, (12, RolesEnded(6, restarts=3)), (12, SlurmAnswered()), (13, NodesAnswered(False))],
        [EndRoles(), AskSlurm(), AskNodes(), USED_UP, Explain("trainer", 1), Exit(FAILED)],
    ),
    "a lost node": (
        SLURM,
        [*SERVER_DIES, (12, RolesEnded(4)), (12, SlurmAnswered()), (13, NodesAnswered(True))],
        [EndRoles(), AskSlurm(), AskNodes(), Explain("rollout", 1), *restarts(1, "a node is lost")],
    ),
    "a lost node when restarts are used up": (
        SLURM,
        [*SERVER_DIES, (12, RolesEnded(4, restarts=3)), (12, SlurmAnswered()), (13, NodesAnswered(True))],
        [EndRoles(), AskSlurm(), AskNodes(), USED_UP, Explain("rollout", 1), Exit(FAILED)],
    ),
    "the killed step is the cause": (
        SLURM,
        [(9, Ended("controller", 1)), (9, TICK), (10, Ended("trainer", 9, True)), (11, TICK), (12, RolesEnded(4)),
         (12, SlurmAnswered()), (13, NodesAnswered(False))],
        [EndRoles(), AskSlurm(), AskNodes(), STUCK, Explain("trainer", 9), Exit(FAILED)],
    ),
    "stopped as asked": (
        SLURM,
        [*STOPS, (12, RolesEnded(6)), (12, SlurmAnswered())],
        [ASKED, SendStop(), EndRoles(), AskSlurm(), *STOPPED_AT_6, Requeue()],
    ),
    "stopped as asked, whatever else ended first": (
        SLURM,
        [(9, Ended("rollout", 1)), (9, TICK), (10, Ended("trainer", STOPPED)), (11, TICK), (12, RolesEnded(6)),
         (12, SlurmAnswered())],
        [EndRoles(), AskSlurm(), *STOPPED_AT_6, Requeue()],
    ),
    "stopped as asked, submitted with --no-requeue": (
        SLURM,
        [*STOPS, (12, RolesEnded(6)), (12, SlurmAnswered(requeues=False))],
        [ASKED, SendStop(), EndRoles(), AskSlurm(), *STOPPED_AT_6, NO_REQUEUE, Exit(STOPPED)],
    ),
    "stopped as asked without a newer checkpoint": (
        SLURM,
        [*STOPS, (12, RolesEnded(4)), (12, SlurmAnswered()), (13, NodesAnswered(False))],
        [ASKED, SendStop(), EndRoles(), AskSlurm(), AskNodes(), STUCK, Explain("trainer", STOPPED), Exit(FAILED)],
    ),
    "the request is sent again every 5 s": (
        SLURM,
        [(0, StopRequested()), (3, TICK), (5, TICK), (6, TICK), (10, TICK)],
        [ASKED, SendStop(), SendStop(), SendStop()],
    ),
    "a second request does not lengthen the grace": (
        replace(SLURM, resend=float("inf")),
        [(0, StopRequested()), (200, StopRequested()), (241, TICK)],
        [ASKED, SendStop(), SendStop(), Print("no checkpoint within 240 s; the unfinished step will be done again"),
         EndRoles()],
    ),
    "the grace is over, but there was a checkpoint before": (
        replace(SLURM, resend=float("inf")),
        [(0, StopRequested()), (241, TICK), (242, RolesEnded(6)), (242, SlurmAnswered())],
        [ASKED, SendStop(), Print("no checkpoint within 240 s; the unfinished step will be done again"), EndRoles(),
         AskSlurm(), *STOPPED_AT_6, Requeue()],
    ),
    "the grace is over and nothing was saved": (
        replace(SLURM, resend=float("inf")),
        [(0, StopRequested()), (241, TICK), (242, RolesEnded(4)), (242, SlurmAnswered()), (243, NodesAnswered(False))],
        [ASKED, SendStop(), Print("no checkpoint within 240 s; the unfinished step will be done again"), EndRoles(),
         AskSlurm(), AskNodes(), STUCK, Explain("trainer", STOPPED), Exit(FAILED)],
    ),
    "replaced when the roles have ended, even with DONE": (
        SLURM,
        [*CRASHES, (12, RolesEnded(9, done=True, replaced_by=3))],
        [EndRoles(), REPLACED, Exit(FAILED)],
    ),
    "replaced while slurmctld is waited for": (
        SLURM,
        [*CRASHES, (12, RolesEnded(9)), (99, SlurmAnswered(replaced_by=3))],
        [EndRoles(), AskSlurm(), REPLACED, Exit(FAILED)],
    ),
    "slurmctld does not come back": (
        SLURM,
        [*CRASHES, (12, RolesEnded(9)), (999, SlurmSilent())],
        [EndRoles(), AskSlurm(), Print("it does not come back; to go on: sbatch again"), Exit(FAILED)],
    ),
    "a crash with --no-requeue": (
        SLURM,
        [*CRASHES, (12, RolesEnded(6)), (12, SlurmAnswered(requeues=False)), (13, NodesAnswered(False))],
        [EndRoles(), AskSlurm(), AskNodes(), Explain("trainer", 1), NO_REQUEUE, Exit(STOPPED)],
    ),
    "SLURM announces a preemption and the trainers save": (
        SLURM,
        [(9, Ended("trainer", STOPPED)), (9, TICK), (11, TICK), (12, RolesEnded(6)),
         (12, SlurmAnswered(preempted=True))],
        [EndRoles(), AskSlurm(), *STOPPED_AT_6, Requeue()],
    ),
    "a preemption ends the roles before anything was saved": (
        SLURM,
        [*CRASHES, (12, RolesEnded(4)), (12, SlurmAnswered(preempted=True))],
        [EndRoles(), AskSlurm(), PREEMPTED, Requeue()],
    ),
    "a preemption counts no restart, however many there were": (
        SLURM,
        [*SERVER_DIES, (12, RolesEnded(4, restarts=3)), (12, SlurmAnswered(preempted=True))],
        [EndRoles(), AskSlurm(), PREEMPTED, Requeue()],
    ),
    "a preemption with --no-requeue": (
        SLURM,
        [*CRASHES, (12, RolesEnded(4)), (12, SlurmAnswered(requeues=False, preempted=True))],
        [EndRoles(), AskSlurm(), PREEMPTED, NO_REQUEUE, Exit(STOPPED)],
    ),
    "the roles end because SLURM ends the job": (
        SLURM,
        [*CRASHES, (12, RolesEnded(6)), (12, SlurmAnswered(ending=True))],
        [EndRoles(), AskSlurm(), Print(ENDS), Exit(143)],
    ),
    "SLURM ends a running attempt": (SLURM, [(1, Interrupted(15, newest=6))], [Print(ENDS), Exit(143)]),
    "SLURM ends an attempt that is being judged": (
        SLURM,
        [*CRASHES, (12, RolesEnded(6)), (13, Interrupted(15, newest=6))],
        [EndRoles(), AskSlurm(), Print(ENDS), Exit(143)],
    ),
    "SLURM carries out the requeue": (
        SLURM,
        [*STOPS, (12, RolesEnded(6)), (12, SlurmAnswered()), (13, Interrupted(15, newest=6))],
        [ASKED, SendStop(), EndRoles(), AskSlurm(), *STOPPED_AT_6, Requeue(), Exit(STOPPED)],
    ),
    "SLURM does not carry out the requeue": (
        SLURM,
        [*STOPS, (12, RolesEnded(6)), (12, SlurmAnswered()), (99, RequeueRefused())],
        [ASKED, SendStop(), EndRoles(), AskSlurm(), *STOPPED_AT_6, Requeue(), NOT_QUEUED, Exit(STOPPED)],
    ),
    "an answer that nobody waits for": (
        SLURM, [(1, SlurmAnswered()), (2, NodesAnswered(True)), (3, RolesEnded(9))], [],
    ),
}  # fmt: skip


def run(supervisor: Supervisor, script: Script) -> list[Decision]:
    return [decision for now, event in script for decision in supervisor.handle(event, now)]


@pytest.mark.parametrize("name", HERE_CASES)
def test_on_one_machine(name: str) -> None:
    roles, script, expected = HERE_CASES[name]
    decisions = run(Supervisor(roles, HERE), script)
    assert decisions == expected


@pytest.mark.parametrize("name", SLURM_CASES)
def test_on_slurm(name: str) -> None:
    rules, script, expected = SLURM_CASES[name]
    decisions = run(Supervisor(STEPS, rules), script)
    assert decisions == expected


def test_the_table_reaches_every_kind_of_decision() -> None:
    tables = (HERE_CASES, SLURM_CASES)
    reached = {type(decision) for table in tables for *_, expected in table.values() for decision in expected}
    assert reached == set(Decision.__subclasses__())
    events = {type(event) for table in tables for _, script, _ in table.values() for _, event in script}
    assert events == set(Event.__subclasses__())


@pytest.mark.parametrize(
    ("left", "served", "has_peer", "again"),
    [(1, True, True, True), (0, True, True, False), (1, False, True, False), (1, True, False, False)],
)
def test_when_a_server_is_started_again(left: int, served: bool, has_peer: bool, again: bool) -> None:
    assert may_restart(left, served, has_peer) is again
