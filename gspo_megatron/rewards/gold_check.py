"""What can be known of gold answers before a run: each must score 1 when a response gives it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from gspo_megatron.config.schema import Recipe
from gspo_megatron.rewards import mathematics
from gspo_megatron.rewards.answer_text import find_box
from gspo_megatron.rewards.time_limit import OutOfTime
from gspo_megatron.types import Finding, Problem

GOLDS_OF = "math_verify"
"""The reward that reads gold answers."""
FAILING = "golds-that-fail"
"""Code of the warning."""
SOLUTIONS = "golds-are-solutions"
"""Code of the warning that no response can equal them."""
SOLUTION = "\n#### "
"""Before the answer in GSM8K's field `answer`."""
MOST = 20_000
"""Golds that are looked at: two seconds."""
MOST_READ = 200
"""Expressions among them that math-verify is given: a second."""
SHOWN = 5
"""Golds that a finding quotes."""
_LONGEST = 60


def gold_findings(recipe: Recipe, problems: Iterable[Problem]) -> list[Finding]:
    """Score every gold answer against itself in a box, and count those that are compared as words.

    Args:
        recipe: only `reward.name=math_verify` has golds that are read.
        problems: training and held-out ones.
    """
    if recipe.reward.name != GOLDS_OF:
        return []
    golds = list(itertools.islice((problem.answer for problem in problems if problem.answer is not None), MOST))
    failing = [gold for gold in golds if not _scores_itself(gold)]
    unread = _find_unread(golds)
    words = [gold for gold in golds if mathematics.is_text(gold) or gold in unread]
    solutions = [gold for gold in words if SOLUTION in gold]
    of = f"of {'the first ' * (len(golds) == MOST)}{len(golds)} gold answers"
    found = []
    if failing:
        severity = "error" if len(failing) == len(golds) else "warning"
        message = f"{len(failing)} {of} get 0 when a response gives exactly them: {_show(failing)}"
        fix = "correct them in the data (unbalanced braces, nothing but signs)"
        found.append(Finding(FAILING, severity, "data", message, fix))
    if solutions:
        severity = "error" if len(solutions) == len(golds) else "warning"
        message = f"{len(solutions)} {of} are whole solutions, with the answer behind ####: {_show(solutions)}"
        fix = "write only the answers: tools/prepare_prompts.py takes them from such a file"
        found.append(Finding(SOLUTIONS, severity, "data", message, fix))
        words = [gold for gold in words if gold not in set(solutions)]
    if words:
        message = f"{len(words)} {of} are compared as words, letter by letter: {_show(words)}"
        fix = "nothing to do if these are words; else write only the number or the expression, in LaTeX"
        found.append(Finding("golds-are-words", "info", "data", message, fix))
    return found


def _find_unread(golds: list[str]) -> set[str]:
    """Those of the first expressions of which math-verify reads nothing."""
    once = (gold for gold in dict.fromkeys(golds) if not mathematics.is_number(gold))
    expressions = itertools.islice((gold for gold in once if not mathematics.is_text(gold)), MOST_READ)
    return {gold for gold in expressions if _scores_itself(gold) and _is_unread(gold)}


def _is_unread(gold: str) -> bool:
    try:
        return mathematics.is_unread(gold)
    except OutOfTime:
        return True


def _scores_itself(gold: str) -> bool:
    boxed = mathematics.box(gold)
    if boxed != gold and find_box(boxed) != gold:
        return False  # its braces end the box early
    try:
        return mathematics.score(gold, boxed) == 1.0
    except OutOfTime:
        return False


def _show(golds: list[str]) -> str:
    """The first of them, each once."""
    first = list(dict.fromkeys(golds))[:SHOWN]
    return ", ".join(gold if len(gold) <= _LONGEST else f"{gold[:_LONGEST]}..." for gold in map(repr, first))
