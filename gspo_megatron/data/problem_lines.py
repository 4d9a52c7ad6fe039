"""Lines of a file as problems."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from gspo_megatron.config.loading import refuse
from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.data.conversation_lines import problem_id, question_key, read_messages, read_tools
from gspo_megatron.data.json_lines import broken_line, read_objects
from gspo_megatron.types import Problem


def without_held_out(problems: Collection[Problem], held_out: Collection[Problem]) -> list[Problem]:
    """Return the problems that ask no held-out question, in whichever spelling."""
    taken = {question_key(problem.question, problem.messages) for problem in held_out}
    return [problem for problem in problems if question_key(problem.question, problem.messages) not in taken]


def read_problems(
    section: DataSection, needs_answer: bool = True, key: str = "data.path", counts: Counter[str] | None = None
) -> dict[str, Problem]:
    """Read the problems of a file by id, in the order of its lines.

    Equal prompts count once: the first line stays. For a reward of the user's own, which may read any key, only equal
    lines do.

    Args:
        section: `data` of the recipe, with the keys of its lines.
        needs_answer: whether a line without an answer is refused.
        key: recipe key that names the file.
        counts: is given the number of `lines`, and of those `repeated`.

    Raises:
        RecipeError: a missing or empty file, or a line that is no problem, with file, line and fault.
    """
    path = section.path if key == "data.path" else section.held_out_path
    assert path is not None
    found: dict[str, Problem] = {}
    for where, line in read_objects(path, key):
        problem = make_problem(line, where, key, needs_answer, section)
        first = found.get(problem.id, problem)
        golds = [one.answer or find_field(one.line, section.answer_key) for one in (first, problem)]
        if golds[0] != golds[1]:
            shown = " and ".join(repr(gold)[:60] for gold in golds)
            raise broken_line(key, where, f"repeats a prompt with another answer: {shown}", "keep one of them")
        if not needs_answer and first.line != problem.line:
            problem = replace(problem, id=_line_id(problem))
        first = found.setdefault(problem.id, problem)
        if counts is not None:
            counts.update(lines=1, repeated=first is not problem)
    if not found:
        fix = f"write one object with `{section.prompt_key}` and `{section.answer_key}` per line"
        raise refuse("prompt-file-empty", key, f"{path} holds no problem", fix)
    return found


def make_problem(
    line: dict[str, Any], where: str, key: str, needs_answer: bool, section: DataSection | None = None
) -> Problem:
    """Make the problem of a line.

    Args:
        line: the object.
        where: `FILE line N`.
        key: recipe key that names the file.
        needs_answer: whether a line without an answer is refused.
        section: `data` of the recipe, with the keys of the line; None = the usual ones.

    Raises:
        RecipeError: the line is no problem.
    """
    prompt_key, answer_key, tools_key = (
        (section.prompt_key, section.answer_key, section.tools_key) if section else ("prompt", "answer", "tools")
    )
    prompt, answer = find_field(line, prompt_key), find_field(line, answer_key)
    if prompt is None and prompt_key == "prompt":
        prompt = line.get("messages")
    for name, value, option in ((prompt_key, prompt, "data.prompt_key"), (answer_key, answer, "data.answer_key")):
        if value is None and (name == prompt_key or needs_answer) and name not in line:
            has = ", ".join(map(str, line)) or "nothing"
            fix = f"add `{name}`; it has {has[:200]} ({option} names another key)"
            raise broken_line(key, where, f"has no `{name}`", fix)
    gold = _answer_text(answer)
    if gold is None and needs_answer:
        fix = "write a text that is not empty, or a number"
        raise broken_line(key, where, f"has `{answer_key}`={repr(answer)[:60]}", fix)
    try:
        messages = read_messages(prompt) if isinstance(prompt, list) else ()
        tools = read_tools(find_field(line, tools_key))
    except ValueError as error:
        fault, _, fix = str(error).partition("; ")
        raise broken_line(key, where, f"has {fault}", fix) from None
    question = messages[-1]["content"] if messages else prompt
    if not (isinstance(question, str) and question.strip()):
        raise broken_line(key, where, f"has `{prompt_key}`={repr(prompt)[:60]}", "write a text that is not empty")
    alone = ({"role": "user", "content": question},)
    if tools and not messages:
        messages = alone
    elif messages == alone and not tools:
        messages = ()  # the same prompt as the text
    source, rate = _read_labels(line, where, key)
    number = problem_id(question, messages, tools)
    return Problem(number, question, line, gold, source, rate, messages, tools)


def _line_id(problem: Problem) -> str:
    """Id of a problem whose prompt another line has with other keys."""
    text = json.dumps(problem.line, sort_keys=True, default=str)
    return hashlib.sha256(f"{problem.id}\0{text}".encode()).hexdigest()[: len(problem.id)]


def _read_labels(line: dict[str, Any], where: str, key: str) -> tuple[str, float | None]:
    """`source` and `pass_rate` of a line."""
    source, rate = line.get("source", ""), line.get("pass_rate")
    if not isinstance(source, str):
        raise broken_line(key, where, f"has `source`={repr(source)[:60]}", "write the collection's name")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1):
        raise broken_line(key, where, f"has `pass_rate`={repr(rate)[:60]}", "write a share from 0 to 1")
    return source, None if rate is None else float(rate)


def find_field(line: dict[str, Any], name: str) -> Any:
    """Return the value of a key, or of a path of keys (`reward_model.ground_truth`); None = there is none."""
    if name in line:
        return line[name]
    value: Any = line
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _answer_text(value: object) -> str | None:
    """The gold answer: a text that is not empty, or the text of a number; None = there is none."""
    if isinstance(value, str):
        return value if value.strip() else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if is_number else None


def hash_problems(problems: Iterable[Problem]) -> str:
    """Hash of problems in their order, with all that their lines say."""
    digest = hashlib.sha256()
    for problem in problems:
        content = (problem.id, problem.answer, problem.source, problem.pass_rate, problem.line)
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
