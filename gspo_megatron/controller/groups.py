"""The responses to one prompt, and where all sampled tokens went."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gspo_megatron.controller.generation import Generation
from gspo_megatron.transport.messages import Accounting, TokenCount
from gspo_megatron.types import Prompt, SampleRef


@dataclass(slots=True, eq=False)
class Group:
    """The responses to one prompt."""

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
    """Response tokens received since the start of the run, counted in a file that outlives a killed controller.

    The controller restores the state of the last checkpoint; the difference was sampled since then and is lost.
    """

    def __init__(self, file: Path) -> None:
        file.touch()
        self._file = file.open("r+b", buffering=0)
        self.tokens = int.from_bytes(self._file.read(), "little")

    def add(self, tokens: int) -> None:
        """Count tokens that were just received."""
        self.tokens += tokens
        os.pwrite(self._file.fileno(), self.tokens.to_bytes(8, "little"), 0)


@dataclass(slots=True)
class TokenLedger:
    """Where sampled tokens and prompts went since the start of the run."""

    taken: Counter[str] = field(default_factory=Counter)
    """`tokens` and `prompts` handed to the trainer."""
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    """The same by the reason why they were not."""

    def take(self, group: Group) -> None:
        """Count a group that is trained on."""
        self.taken.update(tokens=group.tokens, prompts=1)
        self.lose(group)

    def drop(self, group: Group, reason: str) -> None:
        """Count a group that is not."""
        self.dropped.setdefault(reason, Counter()).update(tokens=group.tokens, prompts=1)
        self.lose(group)

    def lose(self, group: Group) -> None:
        """Count the tokens that were lost with a server, or on a way that an agent left."""
        if lost := sum(generation.lost for generation in group.generations):
            self.dropped.setdefault("server-lost", Counter()).update(tokens=lost)
        if abandoned := sum(generation.abandoned for generation in group.generations):
            self.dropped.setdefault("agent-branch", Counter()).update(tokens=abandoned)

    def restore(self, accounting: Accounting) -> None:
        """Continue from a report; tokens that were in flight count through their groups."""
        self.taken = Counter(tokens=accounting.taken.tokens, prompts=accounting.taken.prompts)
        self.dropped = {
            reason: Counter(tokens=count.tokens, prompts=count.prompts) for reason, count in accounting.dropped.items()
        }

    def settle(self, in_flight: Sequence[Group], counter: TokenCounter) -> None:
        """Count as dropped what was received and is in no row: it was lost with an earlier attempt."""
        lost = counter.tokens - self.report(in_flight).sampled_tokens
        if lost > 0:
            self.dropped.setdefault("attempt-lost", Counter()).update(tokens=lost)
        else:
            counter.add(-lost)  # a run directory without its counter

    def report(self, in_flight: Sequence[Group]) -> Accounting:
        """All rows, with the groups that are in flight now."""
        waiting = sum(group.tokens + sum(one.lost + one.abandoned for one in group.generations) for group in in_flight)
        dropped = {reason: TokenCount(**counts) for reason, counts in self.dropped.items()}
        return Accounting(
            sampled_tokens=self.taken["tokens"] + sum(count.tokens for count in dropped.values()) + waiting,
            taken=TokenCount(**self.taken),
            dropped=dropped,
            in_flight=TokenCount(tokens=waiting, prompts=len(in_flight)),
        )
