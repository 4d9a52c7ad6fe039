"""Controllers whose responses are made by agents in this event loop, with OpenAI's own client over a fake server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from openai import AsyncOpenAI

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.agent_scheduler import Agents, AgentScheduler
from gspo_megatron.controller.controller import Controller
from gspo_megatron.controller.process_pool import describe_error
from gspo_megatron.controller.servers import ServerSet
from gspo_megatron.data.store import SampleStore
from gspo_megatron.data.tokenizers import HuggingFaceTokenizer
from gspo_megatron.environments.agent_contract import ClientSettings
from gspo_megatron.models import parse_recipe
from tests.places import ROOT
from tests.unit.controller.controllers import RECIPE, InThread, score_first_problem_half
from tests.unit.controller.fakes import FakeServer, Prompts, serving

TOKENIZER = HuggingFaceTokenizer(ROOT / "recipes" / "tokenizers" / "agent")
STOP = TOKENIZER.stop_ids[0]
Agent = Callable[[dict[str, Any], ClientSettings], Awaitable[Any]]


class InLoop:
    """Runs agents in this event loop; processes are tested in test_agent_pool.py."""

    def __init__(self, agent: Agent) -> None:
        self._agent, self._tasks = agent, dict[Future[Any], asyncio.Task[None]]()

    def start(self) -> None:
        pass

    def run(self, problem: dict[str, Any], client: ClientSettings) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        async def work() -> None:
            try:
                future.set_result(await self._agent(problem, client))
            except BaseException as error:
                future.set_result(describe_error(error))

        self._tasks[future] = asyncio.create_task(work())
        return future

    def cancel(self, future: Future[Any]) -> None:
        self._tasks[future].cancel()

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()


def agent_recipe(answers: int = 2, agent: dict[str, Any] | None = None, limit: int = 100, **rollout: Any) -> Recipe:
    """One prompt with a few responses; the file of the agent is never loaded."""
    values = RECIPE.model_dump(mode="json")
    values["model"]["architecture"]["vocab_size"] = 128
    values["tokenizer"] = {"kind": "huggingface", "path": str(ROOT / "recipes/tokenizers/agent")}
    values["batch"] = {"prompts": 1, "answers": answers, "updates": 1}
    values["rollout"] |= {"max_prompt_tokens": 100, "max_answer_tokens": limit, **rollout}
    values["agent"] = {"program": "unused.py:run", **(agent or {})}
    return parse_recipe(values)


@asynccontextmanager
async def agents_at_work(
    directory: Path, fake: FakeServer, agent: Agent, recipe: Recipe | None = None, overlaps: bool = False
) -> AsyncIterator[Controller]:
    """A controller whose endpoint listens."""
    async with serving(fake) as clients:
        clients[0].vocab_size, clients[0].context = 128, 1000
        controller = Controller(
            recipe or agent_recipe(), ServerSet(clients), Prompts(), TOKENIZER, InThread(score_first_problem_half),
            SampleStore(directory), "127.0.0.1", overlaps, False, agents=Agents(InLoop(agent), TOKENIZER),
        )  # fmt: skip
        controller.updater.version = 0
        assert controller._endpoint is not None
        await controller._endpoint.start()
        yield controller
        await controller.close()


def scheduler_of(controller: Controller) -> AgentScheduler:
    assert isinstance(controller.scheduler, AgentScheduler)
    return controller.scheduler


def openai_for(client: ClientSettings) -> AsyncOpenAI:
    """OpenAI's client, without the site's proxies and without its own retries."""
    transport = httpx2.AsyncClient(trust_env=False)
    return AsyncOpenAI(base_url=client.base_url, api_key=client.api_key, http_client=transport, max_retries=0)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode_text(text)


def follow(*turns: str | Sequence[int]) -> Callable[[dict[str, Any]], Sequence[int]]:
    """What the server samples for the n-th request of every response: a text with its stop id, or ids."""

    def sample(body: dict[str, Any]) -> Sequence[int]:
        turn = turns[int(body["request_id"].split("-")[-2])]
        return [*ids_of(turn), STOP] if isinstance(turn, str) else turn

    return sample
