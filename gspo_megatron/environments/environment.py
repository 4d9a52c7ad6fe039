"""The interface of an environment: `reset` to a problem, `step` from the ids of a turn to the ids of its reply.

An environment holds nothing between calls. Where it stands in an episode is its state, which travels with the answer:
any process can take the next step, and an answer that a checkpoint carries goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gspo_megatron.types import Problem


class TokenCodec(Protocol):
    """What an environment asks of a tokenizer."""

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text that stands within an answer."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids."""
        ...


@dataclass(frozen=True, slots=True)
class Turn:
    """What an environment says to a turn of the model."""

    token_ids: tuple[int, ...]
    """The observation: appended as it is, masked, never tokenized again."""
    state: Any
    """Where the episode stands now; JSON-able."""


class Environment(Protocol):
    """A partner of the model. The prompt is the first observation."""

    def reset(self, problem: Problem) -> Any:
        """The state in which an answer to this problem begins."""
        ...

    def step(self, state: Any, action: Sequence[int]) -> Turn:
        """Answer one turn.

        Args:
            state: of `reset`, or of the turn before.
            action: ids that the model sampled in this turn, the one that ended the call included.
        """
        ...


Step = Callable[[Problem, Any, Sequence[int]], Turn]
"""(problem, state or None for the first turn, action) -> what the environment says."""
