"""The supervisor under random sequences of events, as backends send them: every attempt ends, and for its reason."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field

from hypothesis import event, given, settings
from hypothesis import strategies as st

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
    SlurmAnswered,
    SlurmSilent,
    StopRequested,
    Tick,
    Watched,
)
from gspo_megatron.cluster.exit_codes import FAILED, OK, STOPPED
from gspo_megatron.cluster.supervisor import Rules, Supervisor

CASES = settings(max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10, deadline=None, database=None)
CODES = st.sampled_from([0, 0, 1, 2, 7, STOPPED, STOPPED, -9, -11, 137, 143])
GAPS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 100.0])


@dataclass
class World:
    """An attempt as its backend sees it, and what must hold whatever happens."""

    roles: list[Watched]
    rules: Rules
    supervisor: Supervisor
    now: float = 0.0
    running: set[str] = field(default_factory=set)
    codes: dict[str, int] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    facts: RolesEnded = field(default_factory=RolesEnded)
    interrupted: bool = False

    def send(self, happened: Event) -> list[Decision]:
        assert not self.is_over, "nothing comes after the end"
        found = self.supervisor.handle(happened, self.now)
        self.decisions += found
        for decision in found:
            if isinstance(decision, Restart):
                self.check_restart(decision, found)
        if any(isinstance(decision, CountRestart) for decision in found):
            assert any(isinstance(decision, Requeue) for decision in found), "only what is started again is counted"
            assert not self.interrupted and not self.facts.done and self.facts.replaced_by is None
        return found

    @property
    def is_over(self) -> bool:
        return any(isinstance(decision, Exit) for decision in self.decisions)

    @property
    def is_ending(self) -> bool:
        return any(isinstance(decision, EndRoles) for decision in self.decisions)

    def check_restart(self, decision: Restart, together: list[Decision]) -> None:
        role = next(role for role in self.roles if role.name == decision.name)
        assert decision.name not in self.running and role.kind == "rollout"
        peers = [other for other in self.roles if other.kind == role.kind and other.name in self.running]
        assert peers, "nobody serves meanwhile"
        assert not any(isinstance(other, EndRoles) for other in together), "it would be ended at once"
        self.restarts[role.name] = self.restarts.get(role.name, 0) + 1
        assert self.restarts[role.name] + decision.left == role.restarts

    def end(self, name: str, code: int) -> None:
        self.running.discard(name)
        self.codes[name] = code
        self.send(Ended(name, code, killed=code < 0))

    def tick(self, gap: float) -> None:
        self.now += gap
        for decision in self.send(Tick()):
            if isinstance(decision, Restart):
                self.running.add(decision.name)
                del self.codes[decision.name]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    if queue := draw(st.booleans()):
        roles = [Watched(kind) for kind in ("rollout", "controller", "trainer")]
        rules = Rules(
            2.0, "RUN", True, 2, draw(st.integers(0, 5)), draw(st.sampled_from([1.0, 240.0])), 5.0,
            draw(st.integers(0, 3)), "sbatch again",
        )  # fmt: skip
    else:
        servers, trainers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        roles = [Watched(f"rollout-{n}", draw(st.integers(0, 3))) for n in range(servers)]
        roles += [Watched("controller"), *(Watched(f"trainer-{n}") for n in range(trainers))]
        rules = Rules(settle=0.5)
    event(f"queue={queue}")
    return World(roles, rules, Supervisor(roles, rules), running={role.name for role in roles})


def disturb(world: World, data: st.DataObject) -> None:
    """One thing that may happen while an attempt runs."""
    kinds = ["tick", "tick", "end", "stop", "interrupt", "stray"]
    kind = data.draw(st.sampled_from(kinds))
    if kind == "end" and world.running:
        world.end(data.draw(st.sampled_from(sorted(world.running))), data.draw(CODES))
    elif kind == "stop":
        world.send(StopRequested())
    elif kind == "interrupt" and data.draw(st.integers(0, 3)) == 0:
        world.interrupted = True
        world.send(Interrupted(data.draw(st.sampled_from([signal.SIGINT, signal.SIGTERM]))))
    elif kind == "stray" and not world.is_ending:
        stray = data.draw(st.sampled_from([RolesEnded(9, True), SlurmAnswered(), SlurmSilent(), NodesAnswered(True)]))
        assert world.send(stray) == [], "nobody has asked"
    else:
        world.tick(data.draw(GAPS))


def answer(world: World, data: st.DataObject) -> None:
    """What the backend answers to the questions of a supervisor that ends its attempt, until it has ended."""
    ended = {name: world.codes.get(name) for name in (role.name for role in world.roles)}
    asked = next(decision for decision in reversed(world.decisions) if not isinstance(decision, (Print, Explain)))
    questions: list[type[Decision]] = []
    while not world.is_over:
        if data.draw(st.integers(0, 9)) == 0:
            world.interrupted = True
            world.send(Interrupted(signal.SIGTERM))
            if world.is_over:
                break
        questions.append(type(asked))
        assert len(questions) == len(set(questions)), "a question is asked once"
        if isinstance(asked, EndRoles):
            newer = data.draw(st.sampled_from([None, None, None, 3])) if world.rules.queue else None
            steps = st.integers(world.rules.started_from, 9)
            done = world.rules.queue and data.draw(st.booleans())
            world.facts = RolesEnded(data.draw(steps), done, newer, data.draw(st.integers(0, 4)))
            found = world.send(world.facts)
        elif isinstance(asked, AskSlurm):
            answers = [SlurmAnswered(), SlurmAnswered(), SlurmAnswered(False), SlurmAnswered(True, 3), SlurmSilent()]
            found = world.send(data.draw(st.sampled_from(answers)))
        elif isinstance(asked, AskNodes):
            found = world.send(NodesAnswered(data.draw(st.booleans())))
        else:
            assert isinstance(asked, Requeue)
            found = world.send(RequeueRefused())
        asked = found[-1]
    check_end(world, ended)


def check_end(world: World, ended: dict[str, int | None]) -> None:
    code = next(decision.code for decision in world.decisions if isinstance(decision, Exit))
    event(f"exit {code}")
    trainers = [ended.get(role.name) for role in world.roles if role.kind == "trainer"]
    assert code in (OK, FAILED, STOPPED, 128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert (code == OK) <= (world.facts.done if world.rules.queue else set(trainers) == {OK})
    if not world.rules.queue and not world.interrupted:
        well = all(one in (OK, STOPPED) for one in trainers)
        assert code == (max(one or OK for one in trainers) if well else FAILED), ended
        assert well or any(isinstance(decision, Explain) for decision in world.decisions), "a failure has a name"
    assert (code > 128) <= world.interrupted


@CASES
@given(worlds(), st.data())
def test_every_attempt_ends_for_its_reason(world: World, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(0, 12))):
        if world.is_ending or world.is_over:
            break
        disturb(world, data)
    # Whatever happened before: without a process left, two looks apart by the settling time are the end.
    if not (world.is_ending or world.is_over):
        for name in sorted(world.running):
            world.end(name, data.draw(CODES))
        world.tick(0.0)
    if not (world.is_ending or world.is_over):
        world.tick(world.rules.settle)
    assert world.is_ending or world.is_over, "no process is left, and nobody notices"
    if not world.is_over:
        answer(world, data)
