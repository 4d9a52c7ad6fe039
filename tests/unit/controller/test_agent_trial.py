"""`gspo check` runs an agent with what models say, and names what it does wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.cli import main
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
