"""Which problems of a file are drawn: a window of pass rates, and sources in fixed shares."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from gspo_megatron.config.loading import refuse
from gspo_megatron.types import Problem

log = logging.getLogger(__name__)


def keep_within(problems: Sequence[Problem], window: tuple[float, float]) -> list[Problem]:
    """The problems whose pass rate lies in the window. Raises RecipeError if one has none, or none is left."""
    low, high = window
    without = next((problem for problem in problems if problem.pass_rate is None), None)
    if without is not None:
        raise refuse(
            "pass-rate-missing", "data.pass_rate", f"the problem {without.question[:60]!r} has no `pass_rate`",
            "measure it for every line (tools/prepare_prompts.py --pass-rate-key), or set it to null",
        )  # fmt: skip
    kept = [problem for problem in problems if problem.pass_rate is not None and low <= problem.pass_rate <= high]
    if not kept:
        raise refuse(
            "no-training-problems", "data.pass_rate",
            f"none of {len(problems)} problems lies within {low:g} to {high:g}", "widen it",
        )  # fmt: skip
    log.info("data.pass_rate keeps %d of %d problems", len(kept), len(problems))
    return kept


class Mixture:
    """Which source the problem at a position comes from: in a row of as many as all shares together, each has its own.

    A pure function of the position, so that a stream resumes exactly; the order within a row is shuffled.
    """

    def __init__(self, shares: Mapping[str, int], problems: Sequence[Problem]) -> None:
        """Raises RecipeError for a source that the file has and the shares have not, or the other way round."""
        there = Counter(problem.source for problem in problems)
        for name in sorted(there.keys() - shares.keys()):
            raise refuse(
                "mixture-incomplete", "data.mixture", f"{there[name]} problems come from {name or 'no'!r} source",
                "give it a number; 0 leaves it out",
            )  # fmt: skip
        for name in sorted(shares.keys() - there.keys()):
            if shares[name]:
                raise refuse(
                    "mixture-without-problems", "data.mixture", f"no problem is left of the source {name!r}",
                    f"drop it; the file has {', '.join(sorted(filter(None, there)))}",
                )  # fmt: skip
        self.shares = {name: share for name, share in sorted(shares.items()) if share}
        self.row = sum(self.shares.values())

    def place(self, stream: str, position: int) -> tuple[str, int]:
        """The source of a position of a stream, and how many of that source came before."""
        row, place = divmod(position, self.row)
        names = [name for name, share in self.shares.items() for _ in range(share)]
        random.Random(f"{stream}/mixture/{row}").shuffle(names)
        source = names[place]
        return source, row * self.shares[source] + names[:place].count(source)
