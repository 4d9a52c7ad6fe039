"""An environment of one's own: its form, its sample turns, and what becomes of its replies."""

from __future__ import annotations

import enum
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config.hooks import HOOKS, check_contract
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.long_responses import EnvironmentSection
from gspo_megatron.environments import Reply, make_step, read_call_ids
from gspo_megatron.environments.own_environment import TURNS, check_form, try_episodes
from gspo_megatron.models import load_recipe
from gspo_megatron.types import Problem
from tests.places import ROOT

EXAMPLE = ROOT / "recipes" / "environments" / "guess_number.py"
PROBLEM = Problem("p", "q", {"answer": "7"})


class Letters:
    """One id a character."""

    def encode_text(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def write_messages(messages: Sequence[Mapping[str, Any]], last_id: int) -> list[int]:
    return [last_id, *(ord(letter) for message in messages for letter in f"[{message['role']}:{message['content']}]")]


def test_the_example_plays() -> None:
    section = EnvironmentSection(name=f"{EXAMPLE}:GuessNumber")
    assert section.is_own and section.call_end is None and read_call_ids(section, Letters()) == ()
    step, codec = make_step(section, Letters(), write_messages), Letters()
    first = step(PROBLEM, None, codec.encode_text("5!")[:-1])
    assert codec.decode(first.token_ids) == "5[user:higher]" and not first.done and first.reward == {"turns": 0.0}
    calls = "".join(f'<tool_call>{{"name": "{name}"}}</tool_call>' for name in ("is_even", "digits", "x"))
    second = step(PROBLEM, first.state, codec.encode_text(calls))
    assert codec.decode(second.token_ids)[1:] == "[tool:False][tool:1][tool:no such tool]"
    last = step(PROBLEM, second.state, codec.encode_text("7"))
    assert last.done and last.token_ids == () and last.reward == {"turns": pytest.approx(1 / 3)}


class Plain:
    """Replies with a text and gives no reward."""

    def reset(self, line: dict[str, Any]) -> Any:
        return []

    def step(self, state: Any, turn: Any) -> Any:
        return Reply([*state, turn.text[:3]], " ok ")


class Ids(Plain):
    def step(self, state: Any, turn: Any) -> Any:
        return Reply(state, [5, 6])


def test_texts_and_ids_are_appended_as_they_are() -> None:
    codec = Letters()
    for made, ids in ((Plain, codec.encode_text(" ok ")), (Ids, [5, 6])):
        step = make_step(EnvironmentSection(name=f"{__name__}:{made.__name__}"), codec, write_messages)
        assert list(step(PROBLEM, None, [65]).token_ids) == ids and step(PROBLEM, None, [65]).reward is None
    assert try_episodes(Plain) == [f"replied to {len(TURNS)} sample turns; 0 of them ended the episode, 0 had a reward"]


class Phase(enum.StrEnum):
    ASK = "ask"


class Typed:
    """Keeps what only its own module can read, and what JSON writes."""

    @staticmethod
    def reset(line: dict[str, Any]) -> Any:
        return {"phase": Phase.ASK}

    def step(self, state: Any, turn: Any) -> Any:
        return Reply({"phase": Phase(state["phase"])}, [Number.FIVE])


class Number(enum.IntEnum):
    FIVE = 5


def test_a_turn_goes_to_other_processes_without_the_user_s_module() -> None:
    check_form(Typed)
    step = make_step(EnvironmentSection(name=f"{__name__}:Typed"), Letters(), write_messages)
    turn = step(PROBLEM, None, [65])
    assert type(turn.state["own"]["phase"]) is str and [type(one) for one in turn.token_ids] == [int]
    assert pickle.loads(pickle.dumps(turn)) == turn and __name__.encode() not in pickle.dumps(turn)


WRONG = {
    "no class": ("env = 5", "is a int; name a class"),
    "no step": ("class env:\n def reset(self, line): return 0", "has no method step"),
    "arguments": ("class env:\n def __init__(self, x): 0\n def reset(self, line): 0\n def step(self, s, t): 0",
                  "cannot be made without arguments"),
    "parameters": ("class env:\n def reset(self): 0\n def step(self, s, t): 0", "reset cannot be called as"),
    "no reply": ("class env:\n def reset(self, line): 0\n def step(self, s, t): return 'ok'", "returned a str; return"),
    "state": ("class env:\n def reset(self, line): return {1, 2}\n def step(self, s, t): 0",
              "reset: the state is not JSON-serialisable"),
    "observation": (f"{'from gspo_megatron.environments import Reply'}\nclass env:\n def reset(self, line): 0\n"
                    " def step(self, s, t): return Reply(s, ['a'])", "neither a text nor a list"),
    "role": (f"{'from gspo_megatron.environments import Reply'}\nclass env:\n def reset(self, line): 0\n"
             " def step(self, s, t): return Reply(s, [{'role': 'alien', 'content': ''}])", "a role of user, tool"),
    "bytes": ("from gspo_megatron.environments import Reply\nclass env:\n def reset(self, line): 0\n"
              " def step(self, s, t): return Reply(s, b'ok')", "the observation is a bytes; return a text"),
    "nothing": ("from gspo_megatron.environments import Reply\nclass env:\n def reset(self, line): 0\n"
                " def step(self, s, t): return Reply(s, None)", "the observation is a NoneType; return a text"),
    "half a pair": ("from gspo_megatron.environments import Reply\nclass env:\n def reset(self, line): 0\n"
                    " def step(self, s, t): return Reply(s, [{'role': 'user', 'content': '\\ud83d'}])",
                    "half a surrogate pair"),
    "cancelled": ("import asyncio\nclass env:\n def reset(self, line): 0\n"
                  " def step(self, s, t): raise asyncio.CancelledError", "step after '2' raised CancelledError"),
    "negative id": (f"{'from gspo_megatron.environments import Reply'}\nclass env:\n def reset(self, line): 0\n"
                    " def step(self, s, t): return Reply(s, [5, -1])", "holds the token id -1"),
    "done": ("from gspo_megatron.environments import Reply\nclass env:\n def reset(self, line): 0\n"
             " def step(self, s, t): return Reply(s, done=1)", "done=1 is no bool"),
    "reward": ("from gspo_megatron.environments import Reply\nclass env:\n def reset(self, line): 0\n"
               " def step(self, s, t): return Reply(s, reward=float('nan'))", "nan of a turn is no finite number"),
    "raises": ("class env:\n def reset(self, line): 0\n def step(self, s, t): return t.calls[0]",
               "step after '2' raised IndexError"),
    "changes": ("from gspo_megatron.environments import Reply\nclass env:\n def reset(self, line): line.clear()\n"
                " def step(self, s, t): return Reply(s)", "changed the line of the problem"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_environment_is_a_sentence(name: str) -> None:
    source, sentence = WRONG[name]
    space: dict[str, Any] = {}
    exec(source, space)
    with pytest.raises(ValueError, match=sentence):
        check_form(space["env"])
        try_episodes(space["env"])


REMARKS = {
    "an instance keeps count": ("self.n = getattr(self, 'n', 0) + 1; return Reply(s, str(self.n))", "keep all in"),
    "keys": ("return Reply({1: 2})", "keys become texts"),
    "large": ("return Reply('x' * 2_000_000)", "which are stored with each response"),
    "in order": ("return Reply(s, 'go on')", ""),
}


@pytest.mark.parametrize("name", REMARKS)
def test_what_is_seldom_meant_is_said(name: str) -> None:
    body, sentence = REMARKS[name]
    space: dict[str, Any] = {}
    head = "from gspo_megatron.environments import Reply\nclass env:\n def reset(self, line): return 0\n"
    exec(f"{head} def step(self, s, t): {body}", space)
    _, *remarks = try_episodes(space["env"])
    assert [sentence in remark for remark in remarks] == ([True] if sentence else [])


def test_nothing_awaits_a_step() -> None:
    async def step(self: object, state: object, turn: object) -> None: ...

    with pytest.raises(ValueError, match="step is `async def`, and nothing awaits it in a hook environment"):
        check_contract(HOOKS["environment"], type("Env", (), {"reset": lambda self, line: 0, "step": step}))


def test_gspo_check_runs_the_contract(tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text(WRONG["no reply"][0])
    command = [sys.executable, "-m", "gspo_megatron.cli", "check"]
    good = subprocess.run([*command, f"{EXAMPLE}:GuessNumber"], cwd=ROOT, capture_output=True, text=True)
    assert good.returncode == 0 and "fits the hook environment: set environment.name=" in good.stdout
    bad = subprocess.run([*command, f"{tmp_path}/env.py:env"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and "return gspo_megatron.environments.Reply(...)" in bad.stderr


def test_a_recipe_names_it_or_is_refused() -> None:
    recipe = load_recipe(ROOT / "recipes/tiny_moe.yaml", [f"environment={{name: '{EXAMPLE}:GuessNumber'}}"])
    assert recipe.environment is not None and recipe.environment.is_own
    built_in = load_recipe(ROOT / "recipes/tiny_moe.yaml", ["environment.name=calculator"]).environment
    assert built_in is not None and built_in.call_end == "</tool_call>"
    for override, sentence in (
        ("environment.name=calculater", "did you mean calculator"),
        (f"environment={{name: '{EXAMPLE}:GuessNumber', reply: x}}", "reply and call_start are the calculator's"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            load_recipe(ROOT / "recipes/tiny_moe.yaml", [override])
