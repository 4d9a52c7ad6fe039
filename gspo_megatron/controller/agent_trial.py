"""What `gspo check` runs of an agent: episodes with the endpoint of a run and a model that says what models say."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from gspo_megatron.config.agent_section import AgentSection
from gspo_megatron.config.hook_samples import NotedLine, Samples
from gspo_megatron.config.plugins import describe_fault, source_of
from gspo_megatron.config.task_sections import RewardSection
from gspo_megatron.controller.agent_endpoint import AgentEndpoint
from gspo_megatron.controller.agent_pool import STRETCH_SECONDS, prepare_process
from gspo_megatron.controller.agent_session import FULL
from gspo_megatron.controller.chat_format import MODEL, ChatRequest, ChatTurn, RequestError
from gspo_megatron.environments.agent_contract import ClientSettings
from gspo_megatron.environments.tool_calls import CALL_END, CALL_START, read_turn
from gspo_megatron.rewards.reward_input import read_parts, weigh_parts
from gspo_megatron.rewards.time_limit import OutOfTime, limit_time

PROBLEM = {"prompt": "What is 1 + 1?", "question": "What is 1 + 1?", "answer": "2"}
MAX_TURNS = 12
"""Of an episode here, where the recipe has more: enough for every turn of `turns_of`."""
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
        turn = read_turn(write(request))
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
        return self.episode if secrets.compare_digest(self.key, key) else None


def try_agent(found: Any, samples: Samples | None = None) -> list[str]:
    """Run the agent through sample episodes of one problem. Raises ValueError with one fault a line.

    Args:
        found: the agent.
        samples: of whose problems the first is tried; None = the problem PROBLEM.
    """
    prepare_process()
    line = dict(samples.draw(1)[0].line) if samples else PROBLEM
    section = samples.recipe.agent if samples else None
    section = section or AgentSection(program="agent:run")
    try:
        with limit_time(STRETCH_SECONDS * len(EPISODES)) as restart:
            return asyncio.run(_run(found, line, section, samples.recipe.reward if samples else None, restart))
    except OutOfTime:
        fault = f"took more than {STRETCH_SECONDS:g} s of processor time; await what takes long, a tool in a process"
        raise ValueError(fault) from None
    except _MissingField as missing:
        return [f"reads problem[{missing.args[0]!r}], which the sample line lacks: give a recipe to run it on its data"]


class _MissingField(Exception):
    """The agent reads a field that the sample line has not."""


async def _run(
    found: Any,
    line: Mapping[str, Any],
    section: AgentSection,
    reward: RewardSection | None,
    restart: Callable[[], None],
) -> list[str]:
    episodes, faults, kinds = TrialEpisodes(), dict[str, None](), dict[str, None]()
    endpoint = AgentEndpoint(episodes)
    await endpoint.start()
    requests = full = 0
    try:
        for turns in EPISODES:
            restart()
            episode = episodes.open(turns, min(section.max_turns, MAX_TURNS))
            client = ClientSettings(episodes.base_url, episodes.key, MODEL)
            given = NotedLine(line)
            with _as_faults(faults, found, episode, given, reward is None):
                returned = await asyncio.wait_for(_call(found, given, client), section.seconds)
                kinds[_describe(returned, reward)] = None
            if not episode.said:
                faults["returned without a request: ask the model through client.base_url and client.api_key"] = None
            requests, full = requests + len(episode.said), full + episode.is_full
    finally:
        # A client that nobody closed closes itself here, and not on a loop that is gone.
        gc.collect()
        await asyncio.sleep(0)
        await endpoint.close()
    if faults:
        raise ValueError("\n".join(faults))
    ended = f"; {full} went on until no turn was left" if full else ""
    return [f"ran {len(EPISODES)} sample episodes of {requests} requests{ended}", *kinds]


def _describe(returned: Any, reward: RewardSection | None) -> str:
    """What training makes of it. Raises ValueError for what is no score."""
    if returned is None:
        return "returned None: the recipe's reward scores the last turn"
    parts = read_parts(returned)
    score = weigh_parts(parts, reward.weights if reward else {})
    low, high = reward.bounds if reward else (0.0, 1.0)
    outside = "" if low <= score <= high else f", outside reward.bounds=[{low:g}, {high:g}] and clipped to it"
    return f"returned the score {score:g}{outside}"


async def _call(found: Any, line: NotedLine, client: ClientSettings) -> Any:
    """What the agent returns. An end of Python would take the loop along."""
    try:
        return await found(line, client)
    except SystemExit as error:
        raise RuntimeError(f"SystemExit: {error}") from None


@contextlib.contextmanager
def _as_faults(
    faults: dict[str, None], found: Any, episode: TrialEpisode, line: NotedLine, is_sample: bool
) -> Iterator[None]:
    """Turn whatever an agent raises into a sentence; a request that is refused ends an episode, as in training."""
    try:
        yield
    except TimeoutError:
        faults["did not return within agent.seconds; return at the end of the conversation"] = None
    # The code is the user's own and may raise anything.
    except Exception as error:
        if is_sample and isinstance(error, KeyError) and error.args == tuple(line.missing[-1:]):
            raise _MissingField(error.args[0]) from None
        if episode.is_full:
            return
        after = f"after the turn: {episode.said[-1]}" if episode.said else "before its first request"
        what = describe_fault(error, source_of(found))
        faults[f"{after} it raised {what}; reply to whatever the model says, or return"] = None
