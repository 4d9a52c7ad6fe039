"""`gspo check` runs an agent with what models say, and names what it does wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.cli import main
from gspo_megatron.controller import agent_trial
from tests.places import ROOT

ASK = """
import json
from openai import AsyncOpenAI

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties":
        {"place": {"type": "string"}, "count": {"type": "integer"}}, "required": ["place"]}}}


async def ask(problem, client, **more):
    api = AsyncOpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=0)
    messages = [{"role": "user", "content": problem["prompt"]}]
    return (await api.chat.completions.create(model=client.model, messages=messages, **more)).choices[0].message
"""
REFUSED = {
    "async def run(problem, client):\n    return 1.0": "returned without a request",
    "async def run(problem, client):\n    await ask(problem, client)\n    return 'good'": "returned a str",
    "async def run(problem, client):\n    await ask(problem, client)\n    return float('nan')": "nan",
    "async def run(problem, client):\n    raise OSError('no disk')": "before its first request it raised OSError",
    "async def run(problem, client):\n    await ask(problem, client)\n    raise SystemExit(3)": "SystemExit: 3",
    "async def run(problem, client):\n    message = await ask(problem, client, tools=[TOOL])\n"
    "    for call in message.tool_calls or []:\n        json.loads(call.function.arguments)['place']\n": (
        "after the turn: call without arguments it raised KeyError: 'place'"
    ),
    "async def run(problem, client):\n    message = await ask(problem, client, tools=[TOOL])\n"
    "    for call in message.tool_calls or []:\n        {'look': 1}[call.function.name]\n": (
        "after the turn: call nothing it raised KeyError: 'no_such_tool'"
    ),
    "async def run(problem, client):\n    message = await ask(problem, client)\n    message.content.split()[0]": (
        "after the turn: nothing it raised IndexError"
    ),
}  # fmt: skip
FITS = {
    "async def run(problem, client):\n    await ask(problem, client)": "returned None: the recipe's reward scores",
    "async def run(problem, client):\n    await ask(problem, client)\n    return {'right': 0.5, '_turns': 3}": (
        "returned the score 0.5"
    ),
    "async def run(problem, client):\n    await ask(problem, client, stream=False)\n    return 7": (
        "returned the score 7, outside reward.bounds=[0, 1] and clipped to it"
    ),
    "async def run(problem, client):\n    while True:\n        await ask(problem, client)": (
        "6 sample episodes of 72 requests; 6 went on until no turn was left"
    ),
    "async def run(problem, client):\n    await ask(problem, client)\n    return problem['mine']": (
        "reads problem['mine'], which the sample line lacks: give a recipe"
    ),
}  # fmt: skip


def check(tmp_path: Path, text: str, *recipe: str) -> int:
    (tmp_path / "my_agent.py").write_text(ASK + text + "\n")
    return main(["check", f"{tmp_path / 'my_agent.py'}:run", *recipe])


@pytest.mark.parametrize(("text", "sentence"), REFUSED.items(), ids=range(len(REFUSED)))
def test_what_an_agent_does_wrong_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, sentence: str
) -> None:
    assert check(tmp_path, text) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said


@pytest.mark.parametrize(("text", "sentence"), FITS.items(), ids=range(len(FITS)))
def test_what_an_agent_returns_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, sentence: str
) -> None:
    assert check(tmp_path, text) == 0
    assert sentence in capsys.readouterr().out


def test_the_agent_of_a_recipe_runs_on_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    agent, recipe = ROOT / "recipes/agents/calculator.py", ROOT / "recipes/tiny_agent.yaml"
    assert main(["check", f"{agent}:run", str(recipe)]) == 0
    assert "ran 6 sample episodes of 10 requests" in capsys.readouterr().out


ENDED = {
    "async def run(problem, client):\n    import os; os._exit(3)": "ended its process (exit code 3)",
    "async def run(problem, client):\n    import os, signal; os.kill(os.getpid(), signal.SIGKILL)": (
        "ended its process (exit code -9)"
    ),
    "async def run(problem, client):\n    raise KeyboardInterrupt": "it raised KeyboardInterrupt",
    "async def run(problem, client):\n    import asyncio; raise asyncio.CancelledError": "it raised CancelledError",
    "async def run(problem, client):\n    import asyncio; asyncio.get_running_loop().stop()\n"
    "    await asyncio.sleep(9)": "it raised RuntimeError: Event loop stopped",
}
STUCK = {
    "async def run(problem, client):\n    import time; time.sleep(1000)": "blocks",
    "async def run(problem, client):\n    while True: pass": "spins",
    "async def run(problem, client):\n    import asyncio; await asyncio.Event().wait()": "waits",
    "async def run(problem, client):\n    import asyncio, time; await asyncio.to_thread(time.sleep, 1000)": "thread",
    "async def run(problem, client):\n    await ask(problem, client)\n    import asyncio\n"
    "    while True:\n        try:\n            await asyncio.sleep(1000)\n        except asyncio.CancelledError:\n"
    "            pass": "swallows",
}


@pytest.mark.parametrize(("text", "sentence"), ENDED.items(), ids=range(len(ENDED)))
def test_an_agent_that_ends_python_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, sentence: str
) -> None:
    assert check(tmp_path, text) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


@pytest.mark.parametrize("text", STUCK, ids=STUCK.values())
def test_an_agent_that_never_returns_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(agent_trial, "MOST_SECONDS", 2.0)
    assert check(tmp_path, text) == 2
    said = capsys.readouterr().err
    assert "did not return, nor ask again, within 2 s: await what takes long" in said and said.count("\n") == 1


def test_a_client_that_blocks_its_process_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The endpoint is in another process, as in training."""
    text = """
async def run(problem, client):
    from openai import OpenAI
    api = OpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=0)
    messages = [{"role": "user", "content": problem["prompt"]}]
    api.chat.completions.create(model=client.model, messages=messages)
"""
    assert check(tmp_path, text) == 0
    assert "ran 6 sample episodes of 6 requests" in capsys.readouterr().out


def test_calls_stay_text_where_no_tool_may_be_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
async def run(problem, client):
    for more in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        message = await ask(problem, client, **more)
        assert not message.tool_calls and isinstance(message.content, str)
"""
    assert check(tmp_path, text) == 0


def test_the_same_fault_of_all_episodes_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, "async def run(problem, client):\n    await ask(problem, client)\n    return 'good'") == 2
    assert capsys.readouterr().err.count("\n") == 1
