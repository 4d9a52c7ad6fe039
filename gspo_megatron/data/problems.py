"""Problem sources: reasoning-gym tasks, files and a user's own, each with a held-out set split by question text."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

from gspo_megatron.config.hooks import is_reference
from gspo_megatron.config.loading import refuse
from gspo_megatron.config.schema import Recipe
from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.data.conversation_lines import problem_id
from gspo_megatron.data.mixture import Mixture, keep_within
from gspo_megatron.data.own_source import TRAIN, OwnProblems
from gspo_megatron.data.problem_lines import hash_problems, read_problems, without_held_out
from gspo_megatron.types import Problem

log = logging.getLogger(__name__)

MOST_REFUSALS = 10_000
"""Consecutive repeated questions after which a source counts as exhausted."""
BLOCK = 1000
"""Items per reasoning-gym dataset."""


class ProblemSource(Protocol):
    """An endless sequence of training problems, and a fixed held-out set that shares no question with it."""

    @property
    def held_out(self) -> tuple[Problem, ...]:
        """The held-out problems, the same for every seed."""
        ...

    def draw(self, stage: str, seed: int, position: int) -> Problem | None:
        """Return the problem at a position of a stage's stream, or None for a held-out question. A pure function."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of every problem, held-out ones included; where they lie does not count."""
        ...

    @property
    def span(self) -> int:
        """Number of consecutive positions that contain a usable problem if the source has one."""
        ...

    @property
    def counts(self) -> dict[str, int]:
        """Number of problems by what became of them, for people: `held out`, `to train on`."""
        ...


def open_problems(section: DataSection, needs_answer: bool = True) -> ProblemSource:
    """Open the source that a recipe names.

    Args:
        section: `data` of the recipe.
        needs_answer: whether a line without `answer` is refused. A reward of one's own reads what it likes.
    """
    if section.source == "file":
        return FileProblems(section, needs_answer)
    if is_reference(section.source):
        return OwnProblems(section, needs_answer)
    assert section.task is not None
    return GymProblems(section.task, section.options, section.held_out)


def every_problem(recipe: Recipe) -> Iterator[Problem]:
    """Yield the held-out problems of a recipe, then those of one pass over the training ones. Raises RecipeError."""
    source = open_problems(recipe.data, needs_answer=not recipe.reward.is_own)
    yield from source.held_out
    for position in range(source.span):
        if problem := source.draw(TRAIN, recipe.run.seed, position):
            yield problem


class GymProblems:
    """A reasoning-gym task, read in blocks. Each (stage, seed, block) is a separate dataset.

    Item `i` of a dataset with seed `s` is drawn from `Random(s + i)`, so neighbouring seeds share problems. Seeds are
    therefore hashes of the block's name. Blocks are needed because some tasks have a fixed number of items.
    """

    span = MOST_REFUSALS

    def __init__(self, task: str, options: dict[str, Any], held_out: int) -> None:
        self._task, self._options = task, options
        self._block: tuple[str, Any] | None = None
        found: dict[str, Problem] = {}
        refused, position = 0, 0
        while len(found) < held_out:
            problem = self._at("held_out", 0, position)
            refused = refused + 1 if problem.id in found else 0
            found.setdefault(problem.id, problem)
            position += 1
            if refused > MOST_REFUSALS:
                raise refuse(
                    "held-out-too-large",
                    "data.held_out",
                    f"{task} has only about {len(found)} questions",
                    f"set it below {len(found)}",
                )
        self.held_out = tuple(found.values())
        # What it generates later depends on nothing else.
        self.fingerprint = f"{task}/{json.dumps(options, sort_keys=True, default=str)}/{hash_problems(self.held_out)}"
        self.counts = {"held out": len(found)}
        self._held_out_ids = frozenset(found)

    def draw(self, stage: str, seed: int, position: int) -> Problem | None:
        """See `ProblemSource.draw`."""
        problem = self._at(stage, seed, position)
        return None if problem.id in self._held_out_ids else problem

    def _at(self, stage: str, seed: int, position: int) -> Problem:
        block, place = divmod(position, BLOCK)
        name = f"{stage}/{seed}/{block}"
        if self._block is None or self._block[0] != name:
            self._block = name, open_gym(self._task, self._options, _hashed_seed(name))
        entry = self._block[1][place]
        question, answer = entry["question"], entry.get("answer")
        return Problem(problem_id(question), question, entry, answer if isinstance(answer, str) else None)


def open_gym(task: str, options: dict[str, Any], seed: int) -> Any:
    """Open the dataset of one block. Raises RecipeError with reasoning-gym's message for an unknown task or option."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # one of its dependencies raises it at the first import
        import reasoning_gym
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=BLOCK, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise refuse(
            "reasoning-gym", "data.task", f"{task} with {options}: {error}", "see the task's options in reasoning-gym"
        ) from None


def _hashed_seed(name: str) -> int:
    """Return 31 bits: some tasks pass their seed to numpy, which accepts 32."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) >> 1


class FileProblems:
    """A file of problems, shuffled again for every pass. Equal prompts count once."""

    def __init__(self, section: DataSection, needs_answer: bool = True) -> None:
        path, apart = section.path, section.held_out_path
        assert path is not None
        counts = Counter[str](lines=0, repeated=0)
        found = read_problems(section, needs_answer, counts=counts)
        if apart is not None:
            kept_out = read_problems(section, needs_answer, "data.held_out_path")
        else:
            # Ordered by hash: the split depends neither on the order of the lines nor on the seed.
            kept_out = dict(sorted(found.items())[: section.held_out])
        self.held_out = tuple(kept_out.values())
        training = without_held_out([problem for _, problem in sorted(found.items())], kept_out.values())
        asked = len(found) - len(training) - (len(kept_out) if apart is None else 0)
        self.counts = {**counts, "held out": len(kept_out), "others that ask a held-out question": asked}
        if asked:
            log.info("%d problems of %s ask a held-out question and are left out", asked, path)
        if not training:
            key = "data.held_out" if apart is None else "data.held_out_path"
            raise refuse(
                "no-training-problems", key, f"all {len(found)} questions of {path} are held out", "hold out fewer"
            )
        if section.pass_rate is not None:
            self.counts["outside data.pass_rate"] = len(training)
            training = keep_within(training, section.pass_rate)
            self.counts["outside data.pass_rate"] -= len(training)
        self.counts["to train on"] = len(training)
        self.fingerprint = hash_problems((*self.held_out, *training))
        self._mixture = Mixture(section.mixture, training) if section.mixture else None
        self._training: dict[str, list[Problem]] = {}
        """Training problems by source if they are mixed, else all under an empty name."""
        for problem in training:
            self._training.setdefault(problem.source if self._mixture else "", []).append(problem)
        self._orders: dict[str, tuple[str, list[int]]] = {}

    @property
    def span(self) -> int:
        """The length of one pass over every source."""
        if self._mixture is None:
            return len(self._training[""])
        shares = self._mixture.shares.items()
        return self._mixture.block * max(-(-len(self._training[name]) // share) for name, share in shares)

    def draw(self, stage: str, seed: int, position: int) -> Problem | None:
        """See `ProblemSource.draw`."""
        source, count = ("", position) if self._mixture is None else self._mixture.place(f"{stage}/{seed}", position)
        problems = self._training[source]
        epoch, place = divmod(count, len(problems))
        order = self._order(source, f"{stage}/{seed}/{epoch}" + (f"/{source}" if source else ""), len(problems))
        return problems[order[place]]

    def _order(self, source: str, name: str, count: int) -> list[int]:
        if self._orders.get(source, ("",))[0] != name:
            order = list(range(count))
            random.Random(name).shuffle(order)
            self._orders[source] = name, order  # only the current pass: a run makes many
        return self._orders[source][1]
