"""Convert a file of mathematics problems to JSONL: one object with `prompt` (or `messages`) and `answer` per line.

It reads what `data.path` reads (JSONL, a JSON list, Parquet, a directory that `datasets` saved), by the same reader, in
the published formats of DAPO-Math-17k, AIME, GSM8K and similar:

    python tools/prepare_prompts.py DAPO-Math-17k/data/dapo-math-17k.parquet data/dapo_math_17k.jsonl
    python tools/prepare_prompts.py AIME_2024/aime_2024.jsonl data/aime_2024.jsonl --instruction boxed

`--source` writes the collection's name into every line: `data.mixture` mixes the sources of a joined file in shares.
`--pass-rate-key` copies a measured share of right answers (0.875, "7/8" or a list of scores) for `data.pass_rate`.
A row that is no problem is left out, counted and shown. Nothing is downloaded: get the files from their publishers,
under their licences.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gspo_megatron.config.refusal import RecipeError, refuse
from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.data.conversation_lines import problem_id
from gspo_megatron.data.json_lines import broken_line, read_objects
from gspo_megatron.data.problem_lines import find_field, make_problem
from gspo_megatron.own_directory import refuse_unwritable
from gspo_megatron.types import Problem, printable

Row = tuple[str, dict[str, Any]]
"""`FILE line N` and the object."""
SOURCE, TARGET = "SOURCE", "TARGET"
PROMPTS = ("prompt", "messages", "problem", "question", "Problem", "Question", "query", "input")
"""Usual field names of a problem."""
ANSWERS = (
    "answer",
    "Answer",
    "expected_answer",
    "ground_truth",
    "solution_answer",
    "final_answer",
    "reward_model",
    "target",
)
"""Usual field names of an answer. `reward_model` is an object with `ground_truth` (DAPO-Math-17k)."""
LABELS = ("source", "pass_rate")
"""Fields that a recipe reads; of a published file they may be anything, so an option names what becomes of them."""
INSTRUCTIONS = {
    "keep": "",
    "boxed": "\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
}
"""Text added after the problem: nothing, or the instruction from Qwen's model cards."""
WRAPPINGS = (
    (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n",
        '\n\nRemember to put your answer on its own line after "Answer:".',
    ),
)
"""Instructions around every problem of a published set. They are removed if another instruction is chosen."""
SOLUTION = "\n#### "
"""Between a solution and its answer in GSM8K's field `answer`."""
SHOWN = 5
"""Rows that are no problem, with what is wrong with them."""
EXACT = 1 << 53
"""Below it a float holds every whole number."""


@dataclass
class Converted:
    """What became of the rows of a file."""

    lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Objects to write, in the order of the rows."""
    dropped: Counter[str] = field(default_factory=Counter[str])
    """Rows left out, by reason."""
    faults: list[str] = field(default_factory=list[str])
    """What is wrong with the first rows that are no problem."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the JSONL and print what was dropped. Returns 2 for a file that cannot be read or written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar=SOURCE, help="file of problems, or a directory of `datasets`")
    parser.add_argument("target", type=Path, metavar=TARGET, help="JSONL file to write; a new one")
    parser.add_argument("--prompt-key", help="field that holds the problem; found by itself for the usual names")
    parser.add_argument("--answer-key", help="field that holds the answer; found by itself for the usual names")
    parser.add_argument("--pass-rate-key", help="field that holds a measured share of right answers; none without it")
    parser.add_argument("--source", default="", help="name of the collection, written into every line")
    parser.add_argument("--instruction", choices=sorted(INSTRUCTIONS), default="keep", help="what to ask for behind it")
    chosen = parser.parse_args(arguments)
    try:
        if os.path.lexists(chosen.target):
            fix = "remove it, or name a new file; nothing was changed"
            raise refuse("target-exists", TARGET, f"{chosen.target} exists", fix)
        rows = list(read_objects(chosen.file, SOURCE))
        section = choose_keys(chosen.file, rows, chosen.prompt_key, chosen.answer_key)
        made = convert(rows, section, chosen.instruction, chosen.pass_rate_key, chosen.source)
        write_new(chosen.target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in made.lines))
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(made.dropped.items())) or "none"
    print(f"{len(made.lines)} problems of {len(rows)} rows to {chosen.target}; dropped: {reasons}")
    for fault in made.faults:
        print(f"  {fault}")
    return 0


def choose_keys(path: Path, rows: Sequence[Row], prompt_key: str | None, answer_key: str | None) -> DataSection:
    """Return the keys of a problem and its answer: the named ones, else the first usual ones that any row has.

    Raises:
        RecipeError: no row, or none with such a key.
    """
    if not rows:
        raise refuse("prompt-file-empty", SOURCE, f"{path} holds no row", "name another file")
    names = dict.fromkeys(name for _, row in rows for name in row)
    keys = [
        _choose(path, rows, names, *choice)
        for choice in ((prompt_key, PROMPTS, "--prompt-key"), (answer_key, ANSWERS, "--answer-key"))
    ]
    return DataSection(path=path, prompt_key=keys[0], answer_key=keys[1])


def _choose(
    path: Path, rows: Sequence[Row], names: dict[str, None], key: str | None, usual: Sequence[str], option: str
) -> str:
    has = ", ".join(names)[:200]
    if key is not None:
        if any(find_field(row, key) is not None for _, row in rows):
            return key
        raise refuse("key-missing", option, f"no row of {path} has `{key}`", f"name one of {has}")
    for name in usual:
        if name in names:
            return name
    message = f"none of {', '.join(usual)} is a field of {path}, which has {has}"
    raise refuse("key-missing", option, message, f"name the field with {option}")


def convert(
    rows: Sequence[Row],
    section: DataSection,
    instruction: str = "keep",
    rate_key: str | None = None,
    source: str = "",
) -> Converted:
    """Return the lines to write. A repeated problem is kept once, one with two different answers not at all.

    Raises:
        RecipeError: no row is a problem.
    """
    made = Converted()
    found: dict[str, dict[str, Any]] = {}
    disputed: set[str] = set()
    for where, row in rows:
        try:
            name, line = _convert_row(row, where, section, instruction, rate_key)
        except RecipeError as error:
            made.dropped["that are no problem"] += 1
            made.faults += [f"{fault.message}; {fault.fix}" for fault in error.findings][: SHOWN - len(made.faults)]
            continue
        if name not in found and name not in disputed:
            found[name] = line | ({"source": source} if source else {})
        elif name in found and found[name]["answer"] == line["answer"]:
            made.dropped["repeated"] += 1
        else:
            # Neither answer is known to be right.
            made.dropped["with two answers"] += 1 + (name in found)
            found.pop(name, None)
            disputed.add(name)
    made.faults = [printable(fault) for fault in made.faults]
    made.lines = list(found.values())
    if not made.lines:
        reasons = "; ".join(made.faults) or "each has two answers"
        raise refuse("prompt-file-empty", SOURCE, f"no row of {section.path} is a problem", reasons)
    return made


def _convert_row(
    row: dict[str, Any], where: str, section: DataSection, instruction: str, rate_key: str | None
) -> tuple[str, dict[str, Any]]:
    """The id of a row's problem, and the line to write. Raises RecipeError: it is no problem."""
    plain = {name: value for name, value in row.items() if name not in LABELS}
    gold = read_gold(find_field(row, section.answer_key))
    problem = make_problem({**plain, section.answer_key: gold}, where, SOURCE, True, section)
    made = _ask(problem, where, instruction)
    question, messages = made.get("prompt", ""), made.get("messages", ())
    line = {**made, "answer": problem.answer} | ({"tools": problem.tools} if problem.tools else {})
    if rate_key:
        line["pass_rate"] = _read_rate(find_field(row, rate_key), where, rate_key)
    return problem_id(question, messages, problem.tools), line


def read_gold(value: Any) -> Any:
    """Return the gold answer in a field: the `ground_truth` of an object, what all items of a list say, what follows
    GSM8K's mark in a solution, or the value.

    Of a list whose items differ nobody said which counts: it is returned, and no answer.
    """
    if isinstance(value, dict) and "ground_truth" in value:
        return read_gold(value["ground_truth"])
    if isinstance(value, list):
        golds = [read_gold(item) for item in value]
        return golds[0] if len({str(gold) for gold in golds}) == 1 else value
    if isinstance(value, str) and SOLUTION in value:
        return value.rpartition(SOLUTION)[2].strip()
    # A column of whole numbers with gaps holds floats. What a text writes as 25.0 is of another type, and stays.
    if type(value) is float and value.is_integer() and abs(value) < EXACT:
        return int(value)
    return value


def _read_rate(value: Any, where: str, key: str) -> float:
    """A share of right answers: a number, `7/8`, or a list of scores. Raises RecipeError for anything else."""
    if isinstance(value, list) and value and all(isinstance(score, bool | int | float) for score in value):
        return sum(score >= 1 for score in value) / len(value)
    right, _, of = str(value).partition("/")
    try:
        rate = float(right) / float(of or 1)
    except (ValueError, ZeroDivisionError):
        rate = -1.0
    if not 0 <= rate <= 1:
        raise broken_line(SOURCE, where, f"has `{key}`={repr(value)[:60]}", "write a share from 0 to 1")
    return rate


def _ask(problem: Problem, where: str, instruction: str) -> dict[str, Any]:
    """The prompt of a line to write, with the chosen instruction. `keep` keeps the published one."""
    question, turns = problem.question, list(problem.messages)
    if instruction != "keep":
        if turns and turns[-1]["role"] != "user":
            fault = f"has messages that end in a turn of {turns[-1]['role']!r}, which takes no instruction"
            raise broken_line(SOURCE, where, fault, "choose --instruction keep")
        for before, after in WRAPPINGS:
            question = question.removeprefix(before).removesuffix(after)
        question = question.strip() + INSTRUCTIONS[instruction]
    return {"messages": [*turns[:-1], {**turns[-1], "content": question}]} if turns else {"prompt": question}


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist yet; nothing is left of one that could not be written. Raises RecipeError."""
    with refuse_unwritable(path, TARGET):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                path.unlink()
                raise


if __name__ == "__main__":
    sys.exit(main())
