"""Agents in processes: many at a time, each can be ended; none sees the key of the job or goes through a proxy."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config.agent_section import AgentSection
from gspo_megatron.config.hooks import load_hook
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.controller.agent_pool import AgentPool
from gspo_megatron.controller.process_pool import Lost
from gspo_megatron.environments.agent_contract import ClientSettings
from gspo_megatron.models import load_recipe
from gspo_megatron.transport.auth import KEY_VARIABLE
from tests.places import ROOT

CLIENT = ClientSettings("http://127.0.0.1:1/v1", "key", "policy")


async def run(problem: dict[str, Any], client: ClientSettings) -> Any:
    """An agent that says what it sees, or never ends."""
    if problem.get("hang"):
        await asyncio.Event().wait()
    if problem.get("raise"):
        raise LookupError("no such tool")
    if "score" in problem:
        return {"text": "1.0", "number": 0.5, "parts": {"a": 1, "b": 0.25}, "none": None}[problem["score"]]
    seen = [os.environ.get(KEY_VARIABLE), os.environ["no_proxy"], client.api_key]
    assert seen == [None, "site.example,127.0.0.1", "key"], seen
    return os.getpid()


def not_asynchronous(problem: dict[str, Any], client: ClientSettings) -> None: ...


async def too_few(problem: dict[str, Any]) -> None: ...


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentPool]:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    monkeypatch.setenv("no_proxy", "site.example")
    made = AgentPool(AgentSection(program=f"{__name__}:run"), 2)
    yield made
    made.close()
    assert multiprocessing.active_children() == []


def test_episodes_run_side_by_side_without_the_key_of_the_job(pool: AgentPool) -> None:
    hanging = [pool.run({"hang": True}, CLIENT) for _ in range(8)]
    results = [pool.run({}, CLIENT).result(120) for _ in range(2)]
    assert all(isinstance(result, float) for result in results), results
    assert results[0] != results[1], "each process gets its turn"
    raised = pool.run({"raise": True}, CLIENT).result(120)
    assert isinstance(raised, Lost) and raised.why == "LookupError: no such tool" and "in run" in raised.trace
    for episode in hanging:
        pool.cancel(episode)
    assert {type(episode.result(120)) for episode in hanging} == {Lost}
    assert isinstance(pool.run({}, CLIENT).result(120), float)


def test_what_an_agent_returns_is_read_in_its_process(pool: AgentPool) -> None:
    """An object of the user's own cannot be read here, where his module is not."""
    assert [pool.run({"score": kind}, CLIENT).result(120) for kind in ("number", "parts", "none")] == [
        0.5, {"a": 1.0, "b": 0.25}, None,
    ]  # fmt: skip
    lost = pool.run({"score": "text"}, CLIENT).result(120)
    assert isinstance(lost, Lost) and "returned a str; return a number" in lost.why


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("not_asynchronous", "is not asynchronous; define it with `async def`"),
        ("too_few", r"cannot be called as run\(problem, client\)"),
        ("CLIENT", "is a ClientSettings; name a function"),
        ("ClientSettings", "is the class ClientSettings; name a function"),
        ("missing", "holds no missing"),
    ],
)
def test_a_wrong_agent_is_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load_hook("agent", f"{__name__}:{name}")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["agent={program: run}"], "run names no function"),
        (["agent={program: 'a.py:run'}"], "tokenizer.kind=sentencepiece has no chat template"),
        (
            ["agent={program: 'a.py:run'}", "environment={name: calculator}"],
            "agent and environment both reply to the model",
        ),
    ],
)
def test_a_recipe_that_fits_no_agent_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(ROOT / "recipes/tiny_moe.yaml", overrides)


def test_the_agent_of_the_recipe_is_one() -> None:
    recipe = load_recipe(ROOT / "recipes/tiny_agent.yaml")
    assert recipe.agent is not None and Path(recipe.agent.program.rpartition(":")[0]).is_file()
    assert asyncio.iscoroutinefunction(load_hook("agent", recipe.agent.program))
