"""The interface of an environment: `reset` to a problem, `step` from the ids of a turn to the ids of the reply.

An environment keeps nothing between calls. The state of an episode is a value that is stored with the response. So
any process can take the next step, and an in-flight response in a checkpoint continues where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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


class Environment(Protocol):
    """An environment. The prompt is the first observation."""

    def reset(self, problem: Problem) -> Any:
        """Return the state at the start of a response to this problem."""
        ...

    def step(self, state: Any, action: Sequence[int]) -> Turn:
        """Reply to one turn.

        Args:
            state: the state from `reset` or from the previous turn.
            action: ids that the model sampled in this turn, including the one that ended the call.
        """
        ...


Step = Callable[[Problem, Any, Sequence[int]], Turn]
"""(problem, state or None for the first turn, action) -> the environment's reply."""
