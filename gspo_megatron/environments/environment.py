"""The interfaces of environments: the one in token ids that the controller asks, and the one of a user's own.

An environment keeps nothing between calls. The state of an episode is a value that is stored with the response. So
any process can take the next step, and an in-flight response in a checkpoint continues where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gspo_megatron.environments.tool_calls import ToolCall
from gspo_megatron.types import Problem


class TokenCodec(Protocol):
    """The part of a tokenizer that an environment uses."""

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text within a response."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of sampled ids."""
        ...


@dataclass(frozen=True, slots=True)
class Turn:
    """The reply of an environment to a turn of the model."""

    token_ids: tuple[int, ...]
    """The observation. Its ids are appended to the response, not trained on, and never tokenized again."""
    state: Any
    """The new state of the episode, JSON-serialisable."""
    done: bool = False
    """The episode is over; the response ends with its last turn."""
    reward: Mapping[str, float] | None = None
    """Sum over the turns so far, by part; None = the environment gives none, and the recipe's reward scores."""


class Environment(Protocol):
    """An environment in token ids. The prompt is the first observation."""

    def reset(self, problem: Problem) -> Any:
        """Return the state at the start of a response to this problem."""
        ...

    def step(self, state: Any, action: Sequence[int]) -> Turn:
        """Reply to one turn.

        Args:
            state: the state from `reset` or from the previous turn.
            action: ids that the model sampled in this turn, including the one that ended it.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModelTurn:
    """A turn of the model, as a user's own environment gets it."""

    text: str
    """All of it, without its stop token."""
    content: str
    """`text` without tool calls."""
    calls: tuple[ToolCall, ...]
    """Tool calls in `text`, by name with arguments; empty where one of them cannot be read."""
    token_ids: tuple[int, ...]
    """What was sampled, stop token included."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a user's own environment replies to a turn."""

    state: Any
    """The new state of the episode, JSON-serialisable."""
    observation: str | Sequence[int] | Sequence[Mapping[str, Any]] = ""
    """A text is appended as it is. Messages (`{"role": "tool", "content": "7"}`) are written by the chat template, and
    the model's next turn is opened. Token ids are appended."""
    reward: float | Mapping[str, float] | None = None
    """Added to that of the other turns. None in every turn: the recipe's reward scores the last turn."""
    done: bool = False
    """The episode is over: nothing more is sampled, and the observation is left out."""


Step = Callable[[Problem, Any, Sequence[int]], Turn]
"""(problem, state or None for the first turn, action) -> the environment's reply."""
MessageEncoder = Callable[[Sequence[Mapping[str, Any]], int], list[int]]
"""(messages, last id of the turn before them) -> ids of the chat template up to the start of the model's next turn."""
