"""The answers to one prompt, and where all sampled tokens went."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gspo_megatron.controller.generation import Generation
from gspo_megatron.types import Prompt, SampleRef


@dataclass(slots=True, eq=False)
class Group:
    """The answers to one prompt."""

    prompt: Prompt
    generations: list[Generation]
    finished: dict[int, SampleRef] = field(default_factory=dict)
    """Scored and stored members, by sample index."""

    @property
    def is_complete(self) -> bool:
        """Whether every member is scored."""
        return len(self.finished) == len(self.generations)

    @property
    def first_version(self) -> int | None:
        """Version under which its first token was sampled; None before."""
        return min(
            (generation.first_version for generation in self.generations if generation.first_version is not None),
            default=None,
        )

    @property
    def tokens(self) -> int:
        """Tokens that were sampled for it."""
        return sum(generation.sampled for generation in self.generations)

    @property
    def members(self) -> list[SampleRef]:
        """Finished members in order."""
        return [self.finished[index] for index in sorted(self.finished)]


class TokenCounter:
    """Answer tokens that were received since the start of the run, in a file: it outlives a controller that is killed.

    What the controller restores is of the last checkpoint; the difference is what was sampled since, and lost.
    """

    def __init__(self, file: Path) -> None:
        file.touch()
        self._file = file.open("r+b", buffering=0)
        self.tokens = int.from_bytes(self._file.read(), "little")

    def add(self, tokens: int) -> None:
        """Count tokens that have just come."""
        self.tokens += tokens
        os.pwrite(self._file.fileno(), self.tokens.to_bytes(8, "little"), 0)


@dataclass(slots=True)
class Accounting:
    """Where sampled tokens and prompts went since the start of the run."""

    taken: Counter[str] = field(default_factory=Counter)
    """`tokens`, `prompts` handed over to be trained on."""
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    """By reason."""

    def take(self, group: Group) -> None:
        """Count a group that is trained on."""
        self.taken.update(tokens=group.tokens, prompts=1)
        self.lose(group)

    def drop(self, group: Group, reason: str) -> None:
        """Count a group that is not."""
        self.dropped.setdefault(reason, Counter()).update(tokens=group.tokens, prompts=1)
        self.lose(group)

    def lose(self, group: Group) -> None:
        """Count the tokens that servers took with them."""
        if lost := sum(generation.lost for generation in group.generations):
            self.dropped.setdefault("server-lost", Counter()).update(tokens=lost)

    def restore(self, report: dict[str, Any]) -> None:
        """Go on from a report; what was carried counts through its groups."""
        self.taken = Counter(report["taken"])
        self.dropped = {reason: Counter(counts) for reason, counts in report["dropped"].items()}

    def settle(self, in_flight: Sequence[Group], counter: TokenCounter) -> None:
        """Count as dropped what was received and is nowhere: an earlier attempt took it with it."""
        lost = counter.tokens - self.report(in_flight)["sampled_tokens"]
        if lost > 0:
            self.dropped.setdefault("attempt-lost", Counter()).update(tokens=lost)
        else:
            counter.add(-lost)  # a run directory without its tally

    def report(self, in_flight: Sequence[Group]) -> dict[str, Any]:
        """As JSON: `sampled` = `taken` + every `dropped` + `carried`, in tokens."""
        waiting = sum(group.tokens + sum(generation.lost for generation in group.generations) for group in in_flight)
        dropped = sum(counts["tokens"] for counts in self.dropped.values())
        return {
            "sampled_tokens": self.taken["tokens"] + dropped + waiting,
            "taken": dict(self.taken),
            "dropped": {reason: dict(counts) for reason, counts in self.dropped.items()},
            "carried": {"tokens": waiting, "prompts": len(in_flight)},
        }
