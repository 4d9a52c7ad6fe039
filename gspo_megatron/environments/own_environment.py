"""A user's own environment behind the interface in token ids, and the contract of its hook."""

from __future__ import annotations

import copy
import inspect
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from gspo_megatron.config.hook_samples import Samples
from gspo_megatron.config.hooks import load_hook
from gspo_megatron.config.plugins import describe_fault
from gspo_megatron.environments.environment import MessageEncoder, ModelTurn, Reply, TokenCodec, Turn
from gspo_megatron.environments.tool_calls import read_turn
from gspo_megatron.types import Problem


class OwnEnvironment:
    """Wraps `reset(line)` and `step(state, turn)` of a user's class. The stored state holds the rewards so far."""

    def __init__(self, reference: str, tokenizer: TokenCodec, encode_messages: MessageEncoder) -> None:
        """
        Args:
            reference: `environment.name`.
            tokenizer: of the model.
            encode_messages: writes messages with the chat template.

        Raises:
            RecipeError: it cannot be loaded, or is no environment.
        """
        self._environment = load_hook("environment", reference)()
        self._tokenizer, self._encode_messages = tokenizer, encode_messages

    def reset(self, problem: Problem) -> dict[str, Any]:
        """Return the state of a new response."""
        return {"own": self._environment.reset(problem.line), "reward": None}

    def step(self, state: Any, action: Sequence[int]) -> Turn:
        """Reply to one turn. Raises ValueError for a reply that is none."""
        reply = read_reply(self._environment.step(state["own"], make_turn(self._tokenizer.decode(action), action)))
        reward = add_rewards(state["reward"], reply.reward)
        ids = () if reply.done else tuple(map(int, self._encode(reply.observation, action[-1])))
        # As a checkpoint gives it back: an Enum or a NamedTuple of the user's would need his module elsewhere.
        state = json.loads(json.dumps(reply.state))
        return Turn(ids, {"own": state, "reward": reward}, reply.done, reward)

    def _encode(self, observation: Any, last: int) -> Sequence[int]:
        if isinstance(observation, str):
            return self._tokenizer.encode_text(observation)
        if observation and isinstance(observation[0], Mapping):
            return self._encode_messages(observation, last)
        return observation


def make_turn(text: str, token_ids: Sequence[int]) -> ModelTurn:
    """Make what an environment gets of a turn."""
    read = read_turn(text)
    return ModelTurn(text, read.content, read.calls, tuple(token_ids))


def read_reply(reply: object) -> Reply:
    """Check a reply. Raises ValueError with one fault."""
    if not isinstance(reply, Reply):
        raise ValueError(f"step returned a {type(reply).__name__}; return gspo_megatron.environments.Reply(...)")
    try:
        json.dumps(reply.state, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the state is not JSON-serialisable ({error}); keep numbers, texts, lists and dicts"
        ) from None
    seen = reply.observation
    if not isinstance(seen, Sequence) or isinstance(seen, (bytes, bytearray)):
        raise ValueError(f"the observation is a {type(seen).__name__}; return a text, or a list of messages or ids")
    if not isinstance(seen, str) and not any(all(isinstance(one, kind) for one in seen) for kind in (int, dict)):
        raise ValueError("the observation is neither a text nor a list of messages or of token ids; return one of them")
    for one in seen:
        if isinstance(one, int) and one < 0:
            raise ValueError(f"the observation holds the token id {one}; ids are at least 0")
        if isinstance(one, dict) and not (one.get("role") in ROLES and isinstance(one.get("content"), str)):
            message = f"the observation holds the message {repr(one)[:80]}"
            raise ValueError(f"{message}; write a role of {', '.join(ROLES)} and a content that is a text")
        if not _is_unicode(one["content"] if isinstance(one, dict) else one):
            raise ValueError(
                "the observation holds half a surrogate pair, which no tokenizer takes; decode it as UTF-8"
            )
    if not isinstance(reply.done, bool):
        raise ValueError(f"done={reply.done!r} is no bool; return True to end the episode")
    add_rewards(None, reply.reward)
    return reply


def _is_unicode(value: Any) -> bool:
    """Whether a text can be written; anything else counts as one."""
    return not isinstance(value, str) or not any("\ud800" <= char <= "\udfff" for char in value)


def add_rewards(before: Mapping[str, float] | None, given: Any) -> dict[str, float] | None:
    """Return the parts of a reward plus those of one more turn; a number is the part `turns`. Raises ValueError."""
    if given is None:
        return None if before is None else dict(before)
    parts = given if isinstance(given, Mapping) else {"turns": given}
    added = dict(before or {})
    for name, value in parts.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"the reward {value!r} of a turn is no finite number; return a number or None")
        added[str(name)] = added.get(str(name), 0.0) + float(value)
    return added


ROLES = ("user", "tool", "system")
"""Roles of messages that a model is answered with."""
LARGE_STATE = 1_000_000
"""Bytes of a state above which `gspo check` speaks of it: it is stored with each response, and after every turn."""
LINE = {"prompt": "What is 1 + 1?", "answer": "2"}
CALL = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "1 + 1"}}\n</tool_call>'
TURNS = ("2", CALL, CALL * 2, "", "<tool_call>\n{", "\ufffd\x00 " * 50, "x" * 100_000)
"""An answer, a call, two, nothing, half a call, broken characters, a long turn."""


def check_form(found: Any) -> list[str]:
    """Check what can be seen without a call. Raises ValueError with one fault a line."""
    if not inspect.isclass(found):
        raise ValueError(f"is a {type(found).__name__}; name a class with reset(line) and step(state, turn)")
    faults = []
    for name, arguments in (("reset", ({},)), ("step", (None, make_turn("", ())))):
        method = getattr(found, name, None)
        if not callable(method):
            faults.append(f"has no method {name}; define reset(line) and step(state, turn)")
        else:
            try:
                is_static = isinstance(inspect.getattr_static(found, name), (staticmethod, classmethod))
                inspect.signature(method).bind(*([] if is_static else [found]), *arguments)
            except TypeError as error:
                faults.append(f"{name} cannot be called as reset(line) or step(state, turn): {error}; take these")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        faults.append(f"cannot be made without arguments: {error}; give them defaults")
    if faults:
        raise ValueError("\n".join(faults))
    return ["has reset(line) and step(state, turn)"]


def try_episodes(found: Any, samples: Samples | None = None) -> list[str]:
    """Play sample turns, each from the state that the one before left. Raises ValueError with one fault.

    Args:
        found: the class.
        samples: of whose problems the first is played; None = a sample line.
    """
    given = samples.draw(1)[0].line if samples else LINE
    line, ends, rewarded, remarks = copy.deepcopy(given), 0, 0, dict[str, None]()
    what = "reset"
    try:
        environment = found()
        start = environment.reset(line)
        read_reply(Reply(start))
        state = start
        for text in TURNS:
            what = f"step after {text[:20]!r}"
            # As a checkpoint gives it back.
            reply = read_reply(environment.step(json.loads(json.dumps(state)), make_turn(text, (5, 6))))
            other = read_reply(found().step(json.loads(json.dumps(state)), make_turn(text, (5, 6))))
            remarks |= _look_at(reply, other, samples)
            ends, rewarded = ends + reply.done, rewarded + (reply.reward is not None)
            state = start if reply.done else reply.state
    except KeyError as error:
        if not samples and what == "reset" and error.args and error.args[0] not in LINE:
            return [f"reads line[{error.args[0]!r}], which the sample line lacks: no turn was tried"]
        raise ValueError(f"{what} raised KeyError: {error}; reply to any text") from None
    except ValueError as fault:
        raise ValueError(f"{what}: {fault}") from None
    # The code is the user's own and may raise anything.
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"{what} raised {describe_fault(error)}; reply to any text") from None
    if line != given:
        raise ValueError("changed the line of the problem, which all responses to it share; copy it first")
    played = f"replied to {len(TURNS)} sample turns; {ends} of them ended the episode, {rewarded} had a reward"
    return [played, *remarks]


def _look_at(reply: Reply, other: Reply, samples: Samples | None) -> dict[str, None]:
    """What is allowed and seldom meant. Raises ValueError for token ids that the recipe's model has not.

    Args:
        reply: of an environment.
        other: of another instance to the same state and turn.
        samples: of the recipe.
    """
    remarks, seen = dict[str, None](), reply.observation
    rows = samples.recipe.arch.vocab_size if samples else None
    if rows is not None and (outside := [one for one in seen if isinstance(one, int) and one >= rows]):
        raise ValueError(f"the observation holds the token id {outside[0]}; the model has {rows}")
    if reply != other:
        remarks["another instance replied otherwise to the same state: keep all in the state, chance too"] = None
    text = json.dumps(reply.state)
    if json.loads(text) != reply.state:
        remarks["the state comes back changed from where it is stored: keys become texts, and tuples lists"] = None
    if len(text) > LARGE_STATE:
        remarks[f"the state has {len(text)} bytes, which are stored with each response after every turn"] = None
    return remarks
