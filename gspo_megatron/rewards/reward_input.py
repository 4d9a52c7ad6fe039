"""What a reward gets, and how its result is read."""

from __future__ import annotations

import math
import numbers
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gspo_megatron.rewards.answer_text import strip_thinking
from gspo_megatron.types import StopReason


@dataclass(frozen=True, slots=True)
class RewardInput:
    """The response that a reward scores."""

    text: str
    """The whole response as text, without its stop token; with an environment the last turn."""
    answer: str
    """The part that counts: `text` without thinking, after the last `reward.answer_marker`, blanks at its ends
    removed."""
    token_ids: tuple[int, ...]
    """Ids of the whole response, stop token and observations included."""
    stop_reason: StopReason
    """`stop` = a stop token was sampled; `length` = cut at the response limit; `repetition`."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes ids travel as bytes: 100,000 numbers one by one take longer than all else of a response."""
        return _unpack, (self.text, self.answer, array("q", self.token_ids).tobytes(), self.stop_reason)


def _unpack(text: str, answer: str, ids: bytes, stop_reason: StopReason) -> RewardInput:
    return RewardInput(text, answer, tuple(array("q", ids)), stop_reason)


def make_input(
    text: str, token_ids: Sequence[int], stop_reason: StopReason, marker: str | None, end: str, is_open: bool
) -> RewardInput:
    """Make the input of a reward.

    Args:
        text: of the response, or of its last turn.
        token_ids: of the whole response.
        stop_reason: why it ended.
        marker: `reward.answer_marker`.
        end: text that ends the thinking.
        is_open: the prompt has opened the thinking already.
    """
    answer = strip_thinking(text, end, is_open)
    answer = (answer.rpartition(marker)[2] if marker else answer).strip()
    return RewardInput(text, answer, tuple(token_ids), stop_reason)


def read_parts(result: object) -> dict[str, float]:
    """Return the parts of a reward's result; one number is the part with the empty name.

    A part whose name begins with `_` is measured and not rewarded: what a judge cost.

    Raises:
        ValueError: it is neither a finite number nor a mapping of names to finite numbers.
    """
    if isinstance(result, Mapping):
        if not result:
            raise ValueError("returned no part; return a number, or a dict with a number for each part")
        return {_name(name): _number(value, f"part {name!r}") for name, value in result.items()}
    return {"": _number(result, "")}


def weigh_parts(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the score before `reward.bounds`: the weighted sum of the parts that are rewarded.

    Args:
        parts: of a result.
        weights: `reward.weights`; empty = 1 each.

    Raises:
        ValueError: the weights name other parts, or no part is rewarded.
    """
    counted = {name: value for name, value in parts.items() if not name.startswith("_")}
    if not counted:
        raise ValueError(
            f"returned only parts that are measured ({', '.join(parts)}); return one without `_` to reward"
        )
    if weights and set(weights) != set(counted):
        named, returned = (", ".join(sorted(names)) or "one number" for names in (weights, counted))
        raise ValueError(f"reward.weights names {named}, the reward returned {returned}; name the same parts")
    return sum(value * weights.get(name, 1.0) for name, value in counted.items())


def _name(name: object) -> str:
    if not (isinstance(name, str) and name.replace("-", "_").isidentifier()):
        raise ValueError(f"returned a part named {name!r}; name parts by letters, digits, _ and -, as metrics are")
    return name


def _number(value: object, what: str) -> float:
    """A finite number. Numbers of numpy and 0-d tensors are numbers; texts and None are not."""
    place = f" for {what}" if what else ""
    # A 0-d array may also hold a text, a date or a complex number.
    plain = getattr(value, "item", lambda: value)() if getattr(value, "ndim", None) == 0 else value
    if isinstance(plain, numbers.Real):
        try:
            number = float(plain)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
        raise ValueError(f"returned {number}{place}, which is not finite; return a finite number")
    shown = "None" if value is None else f"a {type(value).__name__}"
    raise ValueError(f"returned {shown}{place}; return a number, or a dict with a number for each part")
