"""What `gspo check` runs of an agent: episodes with the endpoint of a run and a model that says what models say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from gspo_megatron.config.agent_section import AgentSection
from gspo_megatron.config.hook_samples import NotedLine, Samples
from gspo_megatron.config.plugins import describe_fault, source_of
from gspo_megatron.config.task_sections import RewardSection
from gspo_megatron.controller.agent_endpoint import AgentEndpoint
from gspo_megatron.controller.agent_pool import prepare_process
from gspo_megatron.controller.agent_session import FULL
from gspo_megatron.controller.chat_format import MODEL, ChatRequest, ChatTurn, RequestError
from gspo_megatron.controller.loop_pool import run_with_tasks
from gspo_megatron.environments.agent_contract import ClientSettings
from gspo_megatron.environments.tool_calls import CALL_END, CALL_START, TurnText, read_turn
from gspo_megatron.rewards.reward_input import read_parts, weigh_parts
from gspo_megatron.transport.auth import is_same_key

MOST_SECONDS = 60.0
"""By the clock, of an agent that neither asks nor returns, where the recipe gives more; a busy machine needs some."""
LOOK_SECONDS = 0.02
PROBLEM = {"prompt": "What is 1 + 1?", "question": "What is 1 + 1?", "answer": "2"}
MAX_TURNS = 12
"""Of an episode here, where the recipe has more: enough for the turns of EPISODES, and answers."""
VALUES = {"string": "1 + 1", "integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}
"""An argument of each JSON type."""

Turn = Callable[[ChatRequest], str]


def answer(request: ChatRequest) -> str:
    """A turn without a call."""
    return "It is \\boxed{2}."


def call(request: ChatRequest) -> str:
    """A call of the first tool with what it requires; without tools, an answer."""
    if not request.tools:
        return answer(request)
    function = request.tools[0].get("function", {})
    properties = function.get("parameters", {}).get("properties", {})
    arguments = {name: VALUES.get(str(schema.get("type")), "") for name, schema in properties.items()}
    return _write_call(str(function.get("name")), arguments)


def call_without_arguments(request: ChatRequest) -> str:
    """A call that lacks what the tool requires."""
    return _write_call(str(request.tools[0].get("function", {}).get("name")) if request.tools else "tool", {})


def call_nothing(request: ChatRequest) -> str:
    """A call of a tool that does not exist."""
    return _write_call("no_such_tool", {"x": None})


def half_a_call(request: ChatRequest) -> str:
    """A call that was cut."""
    return f'{CALL_START}\n{{"name": '


def nothing(request: ChatRequest) -> str:
    """An empty turn."""
    return ""


EPISODES: tuple[tuple[Turn, ...], ...] = (
    (answer,), (call, call), (call_without_arguments,), (call_nothing,), (half_a_call,), (nothing,),
)  # fmt: skip
"""Turns of the model; answers follow."""


def _write_call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{CALL_START}\n{json.dumps({'name': name, 'arguments': arguments})}\n{CALL_END}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the process of the agent says of one episode."""

    fault: str = ""
    kind: str = ""
    """What it returned, in words."""
    missing: Any = None
    """The field that it read and that the line has not."""
    has_raised: bool = False
    is_over: bool = False
    """No further episode can be played."""


@dataclass(slots=True)
class TrialEpisode:
    """An episode whose turns are written beforehand."""

    turns: Sequence[Turn]
    max_turns: int
    said: list[str] = field(default_factory=list)
    """Names of the turns that were asked for."""
    is_full: bool = False

    def waiting(self) -> AbstractContextManager[None]:
        """As `Session.waiting`; nobody looks at the clock of an episode here."""
        return contextlib.nullcontext()

    async def answer(self, request: ChatRequest) -> ChatTurn:
        """The next turn. Raises RequestError after the last that an episode may have."""
        number = len(self.said)
        if number >= self.max_turns:
            self.is_full = True
            raise RequestError(f"agent.max_turns={self.max_turns} requests were answered", FULL)
        write = self.turns[number] if number < len(self.turns) else answer
        self.said.append(" ".join(write.__name__.split("_")))
        text = write(request)
        turn = read_turn(text) if request.reads_calls else TurnText(text, (), False)
        return ChatTurn(turn, "stop", prompt_tokens=8, pieces=(), logprobs=(), number=number, completion_tokens=8)


class TrialEpisodes:
    """The episode that runs, by its key."""

    def __init__(self) -> None:
        self.base_url = ""
        self.key, self.episode = "", TrialEpisode((), 0)

    def open(self, turns: Sequence[Turn], max_turns: int) -> TrialEpisode:
        """Begin an episode."""
        self.key, self.episode = secrets.token_urlsafe(24), TrialEpisode(turns, max_turns)
        return self.episode

    def session(self, key: str) -> TrialEpisode | None:
        """As `AgentScheduler.session`."""
        return self.episode if is_same_key(self.key, key) else None


def try_agent(found: Any, samples: Samples | None = None) -> list[str]:
    """Run the agent through sample episodes of one problem. Raises ValueError with one fault a line.

    It runs in a process of its own, as in training: what blocks, ends Python or never returns is ended with it.

    Args:
        found: the agent.
        samples: of whose problems the first is tried; None = the problem PROBLEM.
    """
    line = dict(samples.draw(1)[0].line) if samples else PROBLEM
    section = samples.recipe.agent if samples else None
    section = section or AgentSection(program="agent:run")
    here, there = multiprocessing.Pipe()
    # A fork has the agent, which no name may lead to; no thread of ours runs yet.
    child = multiprocessing.get_context("fork").Process(
        target=serve_agent, args=(found, samples.recipe.reward if samples else None, there), daemon=True
    )
    child.start()
    there.close()
    try:
        return asyncio.run(_play(child, here, line, section, samples is None))
    finally:
        child.kill()
        child.join()


async def _play(
    child: BaseProcess, pipe: Connection, line: Mapping[str, Any], section: AgentSection, is_sample: bool
) -> list[str]:
    episodes, faults, kinds = TrialEpisodes(), dict[str, None](), dict[str, None]()
    endpoint = AgentEndpoint(episodes)
    await endpoint.start()
    requests = full = 0
    limit = min(section.seconds, MOST_SECONDS)
    try:
        for turns in EPISODES:
            episode = episodes.open(turns, min(section.max_turns, MAX_TURNS))
            pipe.send((line, ClientSettings(episodes.base_url, episodes.key, MODEL)))
            outcome = await _wait(child, pipe, episode, limit)
            requests, full = requests + len(episode.said), full + episode.is_full
            if is_sample and outcome.missing is not None:
                what = f"reads problem[{outcome.missing!r}], which the sample line lacks"
                return [f"{what}: give a recipe to run it on its data"]
            if outcome.fault and not (episode.is_full and outcome.has_raised):
                after = f"after the turn: {episode.said[-1]} " if episode.said else "before its first request "
                faults[(after if outcome.has_raised else "") + outcome.fault] = None
            elif not episode.said:
                faults["returned without a request: ask the model through client.base_url and client.api_key"] = None
            if outcome.kind:
                kinds[outcome.kind] = None
            if outcome.is_over:
                break
    finally:
        await endpoint.close()
    if faults:
        raise ValueError("\n".join(faults))
    ended = f"; {full} went on until no turn was left" if full else ""
    return [f"ran {len(EPISODES)} sample episodes of {requests} requests{ended}", *kinds]


async def _wait(child: BaseProcess, pipe: Connection, episode: TrialEpisode, limit: float) -> Outcome:
    """What came of an episode. Its clock starts again with every request."""
    asked, since = 0, time.monotonic()
    while not pipe.poll():
        if len(episode.said) > asked:
            asked, since = len(episode.said), time.monotonic()
        if time.monotonic() - since > limit:
            return Outcome(
                f"did not return, nor ask again, within {limit:g} s: await what takes long (AsyncOpenAI, "
                "asyncio.to_thread), and return at the end of the conversation", is_over=True,
            )  # fmt: skip
        await asyncio.sleep(LOOK_SECONDS)
    try:
        return pipe.recv()
    except EOFError:
        child.join()
        return Outcome(f"ended its process (exit code {child.exitcode}); return, or raise an exception", is_over=True)


def serve_agent(found: Any, reward: RewardSection | None, pipe: Connection) -> None:
    """The process of the agent: one episode for each message, until the pipe is closed."""
    prepare_process()
    # One loop for all episodes, as in training: an agent may keep its client.
    with asyncio.Runner() as runner, contextlib.suppress(EOFError):
        while True:
            line, client = pipe.recv()
            pipe.send(_run_once(runner, found, NotedLine(line), client, reward))


def _run_once(
    runner: asyncio.Runner, found: Any, line: NotedLine, client: ClientSettings, reward: RewardSection | None
) -> Outcome:
    try:
        returned = runner.run(run_with_tasks(found, line, client))
    # The code is the user's own and may raise anything, the end of Python included.
    except BaseException as error:
        outcome = _raised(found, error, line)
    else:
        try:
            outcome = Outcome(kind=_describe(returned, reward))
        except ValueError as fault:
            outcome = Outcome(str(fault))
    if getattr(sys.stdout, "secrets", False) or getattr(sys.stderr, "secrets", False):
        said = "printed the value of an environment variable that holds a secret; remove it from the output"
        return Outcome(said, is_over=True)
    return outcome


def _raised(found: Any, error: BaseException, line: NotedLine) -> Outcome:
    missing = error.args[0] if isinstance(error, KeyError) and error.args == tuple(line.missing[-1:]) else None
    what = describe_fault(error, source_of(found))
    fault = f"it raised {what}; reply to whatever the model says, or return"
    return Outcome(fault, missing=missing, has_raised=True)


def _describe(returned: Any, reward: RewardSection | None) -> str:
    """What training makes of it. Raises ValueError for what is no score."""
    if returned is None:
        return "returned None: the recipe's reward scores the last turn"
    parts = read_parts(returned)
    score = weigh_parts(parts, reward.weights if reward else {})
    low, high = reward.bounds if reward else (0.0, 1.0)
    outside = "" if low <= score <= high else f", outside reward.bounds=[{low:g}, {high:g}] and clipped to it"
    return f"returned the score {score:g}{outside}"
