"""A user's own source of problems: a function that yields lines from any position on."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from gspo_megatron.config.hooks import load_hook
from gspo_megatron.config.loading import RecipeError, refuse
from gspo_megatron.config.plugins import describe_fault
from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.data.conversation_lines import question_key
from gspo_megatron.data.json_lines import HALF_PAIR, broken_line
from gspo_megatron.data.problem_lines import hash_problems, make_problem
from gspo_megatron.types import Problem

KEY = "data.source"
TRAIN, HELD_OUT = "train", "held_out"
"""Split of the held-out problems; the others are the stages of a run, `train` and `cold_start`."""
SPAN = 10_000
"""Consecutive positions without a usable problem after which a source counts as exhausted."""


class OwnProblems:
    """Problems of a user's function. It is called again wherever the stream continues at another position."""

    span = SPAN

    def __init__(self, section: DataSection, needs_answer: bool) -> None:
        self._section, self._needs_answer = section, needs_answer
        self._function = load_hook("source", section.source)
        self._open: tuple[str, int, int, Iterator[Any]] | None = None
        self._lengths: dict[tuple[str, int], int] = {}
        found: dict[str, Problem] = {}
        for place in range(SPAN if section.held_out else 0):
            if len(found) == section.held_out:
                break
            problem = self._at(HELD_OUT, 0, place)
            if problem is None:
                break
            found.setdefault(problem.id, problem)
        if len(found) < section.held_out:
            raise refuse(
                "held-out-too-large", "data.held_out",
                f"{section.source} yields {len(found)} different problems of the split {HELD_OUT}, and "
                f"{section.held_out} are set", "set it lower, or yield more",
            )  # fmt: skip
        self.held_out = tuple(found.values())
        self.counts = {"held out": len(found)}
        # Its later lines are made from their positions alone.
        options = json.dumps(section.options, sort_keys=True, default=str)
        self.fingerprint = f"{section.source.rpartition('/')[2]}/{options}/{hash_problems(self.held_out)}"
        self._keys = frozenset(question_key(problem.question, problem.messages) for problem in self.held_out)

    def draw(self, stage: str, seed: int, position: int) -> Problem | None:
        """See `ProblemSource.draw`. Raises RecipeError with the position for what is no problem."""
        length = self._lengths.get((stage, seed))
        problem = self._at(stage, seed, position if length is None else position % length)
        if problem is None:  # the source ends before this position: its next pass begins
            problem = self._at(stage, seed, position % self._length(stage, seed))
            assert problem is not None
        return None if question_key(problem.question, problem.messages) in self._keys else problem

    def _length(self, stage: str, seed: int) -> int:
        """Number of problems of a split that ends."""
        if (stage, seed) not in self._lengths:
            count = sum(1 for _ in self._call(stage, seed, 0))
            if not count:
                fix = "yield at least one"
                raise refuse("no-training-problems", KEY, f"{self._section.source} yields no problem of {stage}", fix)
            self._lengths[stage, seed] = count
        return self._lengths[stage, seed]

    def _at(self, stage: str, seed: int, position: int) -> Problem | None:
        """Return the problem at a position; None = the source ends before it."""
        if self._open is None or self._open[:3] != (stage, seed, position):
            self._open = stage, seed, position, self._call(stage, seed, position)
        lines = self._open[3]
        line = next(lines, None)
        self._open = stage, seed, position + 1, lines
        return None if line is None else read_line(line, self._section, stage, position, self._needs_answer)

    def _call(self, stage: str, seed: int, start: int) -> Iterator[Any]:
        """Yield the lines from a position on. What the function raises is one sentence."""
        place = start
        try:
            for line in self._function(stage, seed, start, **self._section.options):
                if line is None:
                    raise TypeError("it yielded None")
                yield line
                place += 1
        except RecipeError:
            raise
        # The code is the user's own and may raise anything.
        except (Exception, SystemExit) as error:
            fault = describe_fault(error)
            message = f"{self._section.source} raised {fault} at position {place} of {stage}"
            raise refuse("source-raised", KEY, message, f"see `gspo check {self._section.source}`") from None


def read_line(line: Any, section: DataSection, stage: str, position: int, needs_answer: bool) -> Problem:
    """Make the problem of one yielded line. Raises RecipeError with its position."""
    where = f"{section.source} at position {position} of {stage}"
    if not isinstance(line, dict) or not all(isinstance(name, str) for name in line):
        fix = "yield a dict with `prompt` and `answer`"
        raise broken_line(KEY, where, f"yielded a {type(line).__name__}, no object with texts as keys", fix)
    try:
        text = json.dumps(line, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        fix = "yield texts, numbers, lists and dicts"
        raise broken_line(KEY, where, f"is no plain object ({error})", fix) from None
    if HALF_PAIR.search(text):
        raise broken_line(KEY, where, "holds half of a surrogate pair", "yield characters")
    return make_problem(line, where, KEY, needs_answer, section)


def check_source(found: Any) -> list[str]:
    """Check the form of a user's source: the contract of the hook. Raises ValueError with one fault a line."""
    if not callable(found):
        raise ValueError(f"is a {type(found).__name__}; name a function problems(split, seed, start)")
    if inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found):
        raise ValueError("is `async`; yield from a plain function")
    try:
        inspect.signature(found).bind(TRAIN, 0, 0)
    except TypeError as error:
        if "options" in str(error) or "missing" in str(error):
            # The recipe's options may fill in the rest.
            return ["takes (split, seed, start) and data.options"]
        raise ValueError(f"cannot be called as problems(split, seed, start): {error}; take these three") from None
    except ValueError:
        pass  # no signature to look at
    return ["takes (split, seed, start)"]


TRIED = 8
"""Lines that `gspo check` takes."""


def try_source(found: Any, samples: object = None) -> list[str]:
    """Take the first lines of a user's source, from the start and from later positions.

    Raises:
        ValueError: one fault a line.
    """
    section = DataSection(path=Path("-"), held_out=0)
    checked = []
    for split in (TRAIN, HELD_OUT):
        lines = _take(found, split, 0, TRIED)
        if not lines and split == TRAIN:
            raise ValueError("yields no line of the split 'train'; yield at least one")
        try:
            for place, line in enumerate(lines):
                read_line(line, section, split, place, needs_answer=False)
        except RecipeError as error:
            raise ValueError("; ".join(finding.message for finding in error.findings)) from None
        for start in range(1, len(lines)):
            again = _take(found, split, start, TRIED - start)
            if again[: len(lines) - start] != lines[start:]:
                raise ValueError(
                    f"yields other lines of {split!r} from start={start} than after {start} lines: a resumed run would "
                    "train on others; make each line from its position alone"
                )
        checked.append(f"yields {'at least ' if len(lines) == TRIED else ''}{len(lines)} lines of {split!r}")
    return [*checked, "yields the same lines from every start: a run resumes exactly"]


def _take(found: Any, split: str, start: int, count: int) -> list[Any]:
    try:
        return list(islice(found(split, 0, start), count))
    # The code is the user's own and may raise anything.
    except (Exception, SystemExit) as error:
        raise ValueError(f"raised {describe_fault(error)} for ({split!r}, 0, {start})") from None
