"""Selection of problems from a file: an interval of pass rates, and sources in fixed shares."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from gspo_megatron.config.loading import refuse
from gspo_megatron.types import Problem

log = logging.getLogger(__name__)


def keep_within(problems: Sequence[Problem], window: tuple[float, float]) -> list[Problem]:
    """Keep the problems with a pass rate in the interval. Raises RecipeError if one has no rate, or none is left."""
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
            f"none of {len(problems)} problems lies within {low:g} to {high:g}", "widen the interval",
        )  # fmt: skip
    log.info("data.pass_rate keeps %d of %d problems", len(kept), len(problems))
    return kept


class Mixture:
    """The source of the problem at each position of a stream.

    Positions form blocks. The length of a block is the sum of the shares, and each source occurs as often as its share
    in every block, in shuffled order. The source is a pure function of the position, so a stream resumes exactly.
    """

    def __init__(self, shares: Mapping[str, int], problems: Sequence[Problem]) -> None:
        """Check the shares. Raises RecipeError for a source that is only in the file or only in the shares."""
        there = Counter(problem.source for problem in problems)
        for name in sorted(there.keys() - shares.keys()):
            raise refuse(
                "mixture-incomplete", "data.mixture",
                f"{there[name]} problems have " + (f"the source {name!r}, which has no share" if name else "no source"),
                "give every source a number; 0 leaves it out",
            )  # fmt: skip
        for name in sorted(shares.keys() - there.keys()):
            if shares[name]:
                raise refuse(
                    "mixture-without-problems", "data.mixture", f"no problem is left of the source {name!r}",
                    f"remove it; the file has {', '.join(sorted(filter(None, there)))}",
                )  # fmt: skip
        self.shares = {name: share for name, share in sorted(shares.items()) if share}
        self.block = sum(self.shares.values())

    def place(self, stream: str, position: int) -> tuple[str, int]:
        """Return the source of a position of a stream, and the number of earlier problems from that source."""
        block, place = divmod(position, self.block)
        names = [name for name, share in self.shares.items() for _ in range(share)]
        random.Random(f"{stream}/mixture/{block}").shuffle(names)
        source = names[place]
        return source, block * self.shares[source] + names[:place].count(source)
