"""Problem sources: reasoning-gym tasks and JSONL files, each with a held-out set split by question text."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from gspo_megatron.config.loading import refuse
from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.data.json_lines import broken_line, read_objects
from gspo_megatron.data.mixture import Mixture, keep_within
from gspo_megatron.types import Problem

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


def open_problems(section: DataSection, needs_answer: bool = True) -> ProblemSource:
    """Open the source that a recipe names.

    Args:
        section: `data` of the recipe.
        needs_answer: whether a line without `answer` is refused. A reward of one's own reads what it likes.
    """
    if section.source == "jsonl":
        assert section.path is not None
        return JsonlProblems(section, needs_answer)
    assert section.task is not None
    return GymProblems(section.task, section.options, section.held_out)


def problem_id(question: str) -> str:
    """Return the stable id of a question: 16 hex digits of its SHA-256."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def hash_problems(problems: Iterable[Problem]) -> str:
    """Hash of problems in their order, with all that their lines say."""
    digest = hashlib.sha256()
    for problem in problems:
        content = (problem.question, problem.answer, problem.source, problem.pass_rate, problem.line)
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


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


class JsonlProblems:
    """A file of problems, shuffled again for every pass. Equal questions count once."""

    def __init__(self, section: DataSection, needs_answer: bool = True) -> None:
        path, apart = section.path, section.held_out_path
        assert path is not None
        found = read_jsonl(path, needs_answer=needs_answer)
        if apart is not None:
            kept_out = read_jsonl(apart, "data.held_out_path", needs_answer)
        else:
            # Ordered by hash: the split depends neither on the order of the lines nor on the seed.
            kept_out = dict(sorted(found.items())[: section.held_out])
        self.held_out = tuple(kept_out.values())
        training = [problem for name, problem in sorted(found.items()) if name not in kept_out]
        if not training:
            key = "data.held_out" if apart is None else "data.held_out_path"
            raise refuse(
                "no-training-problems", key, f"all {len(found)} questions of {path} are held out", "hold out fewer"
            )
        if section.pass_rate is not None:
            training = keep_within(training, section.pass_rate)
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


def read_jsonl(path: Path, key: str = "data.path", needs_answer: bool = True) -> dict[str, Problem]:
    """Read the problems of a file by id, in the order of its lines. Equal prompts count once: the first line stays.

    Args:
        path: of the file.
        key: recipe key that names it.
        needs_answer: whether a line without `answer` is refused.

    Raises:
        RecipeError: a missing or empty file, or a line that is no problem, with file, line and fault.
    """
    found: dict[str, Problem] = {}
    for where, line in read_objects(path, key):
        problem = make_problem(line, where, key, needs_answer)
        first = found.setdefault(problem.id, problem)
        if first.answer != problem.answer:
            fault = f"repeats a prompt with another answer: {first.answer!r} and {problem.answer!r}"
            raise broken_line(key, where, fault, "keep one of them")
    if not found:
        raise refuse(
            "prompt-file-empty", key, f"{path} holds no problem", "write one object with `prompt` and `answer` per line"
        )
    return found


def make_problem(line: dict[str, Any], where: str, key: str, needs_answer: bool) -> Problem:
    """Make the problem of a line. Raises RecipeError."""
    for name in ("prompt", "answer") if needs_answer else ("prompt",):
        if name not in line:
            raise broken_line(key, where, f"has no `{name}`", f"add `{name}`; it has {', '.join(line) or 'nothing'}")
    prompt, answer = line["prompt"], _answer_text(line.get("answer"))
    if answer is None and needs_answer:
        raise broken_line(key, where, f"has `answer`={line['answer']!r}", "write a text that is not empty")
    if not (isinstance(prompt, str) and prompt.strip()):
        raise broken_line(key, where, f"has `prompt`={prompt!r}", "write a text that is not empty")
    source, rate = line.get("source", ""), line.get("pass_rate")
    if not isinstance(source, str):
        raise broken_line(key, where, f"has `source`={source!r}", "write the collection's name")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1):
        raise broken_line(key, where, f"has `pass_rate`={rate!r}", "write a share from 0 to 1")
    return Problem(problem_id(prompt), prompt, line, answer, source, None if rate is None else float(rate))


def _answer_text(value: object) -> str | None:
    """The gold answer: a text that is not empty, or the text of a number; None = there is none."""
    if isinstance(value, str):
        return value if value.strip() else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else None
