"""The answers to one prompt, and where all sampled tokens went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gspo_megatron.rollout.drafts import Draft
from gspo_megatron.types import Prompt, SampleRef


@dataclass(slots=True, eq=False)
class Group:
    """The answers to one prompt."""

    prompt: Prompt
    drafts: list[Draft]
    finished: dict[int, SampleRef] = field(default_factory=dict)
    """Scored and stored members, by sample index."""

    @property
    def is_complete(self) -> bool:
        """Whether every member is scored."""
        return len(self.finished) == len(self.drafts)

    @property
    def born(self) -> int | None:
        """Version under which its first token was sampled; None before."""
        return min((draft.born for draft in self.drafts if draft.born is not None), default=None)

    @property
    def tokens(self) -> int:
        """Answer tokens it has."""
        return sum(map(len, self.drafts))

    @property
    def members(self) -> list[SampleRef]:
        """Finished members in order."""
        return [self.finished[index] for index in sorted(self.finished)]


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
        if lost := sum(draft.lost for draft in group.drafts):
            self.dropped.setdefault("server-lost", Counter()).update(tokens=lost)

    def restore(self, report: dict[str, Any]) -> None:
        """Go on from a report; what was carried counts through its groups."""
        self.taken = Counter(report["taken"])
        self.dropped = {reason: Counter(counts) for reason, counts in report["dropped"].items()}

    def report(self, carried: Sequence[Group]) -> dict[str, Any]:
        """As JSON: `sampled` = `taken` + every `dropped` + `carried`, in tokens."""
        waiting = sum(group.tokens + sum(draft.lost for draft in group.drafts) for group in carried)
        dropped = sum(counts["tokens"] for counts in self.dropped.values())
        return {
            "sampled_tokens": self.taken["tokens"] + dropped + waiting,
            "taken": dict(self.taken),
            "dropped": {reason: dict(counts) for reason, counts in self.dropped.items()},
            "carried": {"tokens": waiting, "prompts": len(carried)},
        }
