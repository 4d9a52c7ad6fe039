"""Convert a file of mathematics problems to JSONL: one object with `prompt` and `answer` per line.

It reads JSON, JSONL and Parquet (with pyarrow installed) in the published formats of DAPO-Math-17k, AIME and similar:

    python tools/prepare_prompts.py DAPO-Math-17k/data/dapo-math-17k.parquet data/dapo_math_17k.jsonl
    python tools/prepare_prompts.py AIME_2024/aime_2024.jsonl data/aime_2024.jsonl --instruction boxed

`--source` writes the collection's name into every line: `data.mixture` mixes the sources of a joined file in shares.
`--pass-rate-key` copies a measured share of right answers (0.875, "7/8" or a list of scores) for `data.pass_rate`.
Nothing is downloaded: get the files from their publishers, under their licences.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPTS = ("prompt", "problem", "question", "Problem", "Question", "query", "input")
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


class BadFile(ValueError):
    """The file cannot be converted. The message is one sentence."""


def main() -> int:
    """Write the JSONL and print what was dropped. Returns 2 for a file that cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="JSON, JSONL or Parquet file")
    parser.add_argument("target", type=Path, help="JSONL file to write")
    parser.add_argument("--prompt-key", help="field that holds the problem; found by itself for the usual names")
    parser.add_argument("--answer-key", help="field that holds the answer; found by itself for the usual names")
    parser.add_argument("--pass-rate-key", help="field that holds a measured share of right answers; none without it")
    parser.add_argument("--source", dest="name", default="", help="name of the collection, written into every line")
    parser.add_argument("--instruction", choices=sorted(INSTRUCTIONS), default="keep", help="what to ask for behind it")
    chosen = parser.parse_args()
    try:
        rows = list(read_rows(chosen.source))
        problems, dropped = convert(
            rows, chosen.prompt_key, chosen.answer_key, chosen.instruction, chosen.pass_rate_key
        )
    except BadFile as error:
        print(f"{chosen.source}: {error}", file=sys.stderr)
        return 2
    chosen.target.parent.mkdir(parents=True, exist_ok=True)
    named = {"source": chosen.name} if chosen.name else {}
    lines = [
        json.dumps({"prompt": prompt, **fields, **named}, ensure_ascii=False) for prompt, fields in problems.items()
    ]
    chosen.target.write_text("\n".join(lines) + "\n")
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none"
    print(f"{len(problems)} problems of {len(rows)} rows to {chosen.target}; dropped: {reasons}")
    return 0


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON list, JSON lines or a Parquet table."""
    if not path.is_file():
        raise BadFile("does not exist; give the path of a downloaded file")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    text = path.read_text()
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in _lines(text)]
    except json.JSONDecodeError as error:
        raise BadFile(f"line {error.lineno} is not JSON: {error.msg}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise BadFile(f"row {number} is not an object")
        yield row


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")  # used for Parquet files only, so not pinned
    except ModuleNotFoundError:
        raise BadFile("is Parquet, and pyarrow is not installed; install it or convert the file to JSONL") from None
    yield from parquet.read_table(path).to_pylist()


def convert(
    rows: list[dict[str, Any]],
    prompt_key: str | None = None,
    answer_key: str | None = None,
    instruction: str = "keep",
    rate_key: str | None = None,
) -> tuple[dict[str, dict[str, Any]], Counter[str]]:
    """Return the problems in order, with `answer` and optionally `pass_rate`, and the number of dropped rows by reason.

    A repeated problem is kept once. A problem with two different answers is dropped: neither is known to be right.
    """
    if not rows:
        raise BadFile("holds no row")
    prompt_key = prompt_key or _find(rows[0], PROMPTS, "--prompt-key")
    answer_key = answer_key or _find(rows[0], ANSWERS, "--answer-key")
    problems: dict[str, dict[str, Any]] = {}
    dropped: Counter[str] = Counter()
    disputed: set[str] = set()
    for row in rows:
        prompt, answer = _text(row.get(prompt_key)), _text(row.get(answer_key))
        if not prompt or not answer:
            dropped["without problem or answer"] += 1
            continue
        rate = _rate(row.get(rate_key)) if rate_key else None
        if rate_key and rate is None:
            dropped["without pass rate"] += 1
            continue
        prompt = _ask(prompt, instruction)
        if prompt in problems or prompt in disputed:
            if prompt in problems and problems[prompt]["answer"] == answer:
                dropped["repeated"] += 1
            else:
                dropped["with two answers"] += 1 + (prompt in problems)
                problems.pop(prompt, None)
                disputed.add(prompt)
            continue
        problems[prompt] = {"answer": answer} | ({} if rate is None else {"pass_rate": rate})
    if not problems:
        raise BadFile(f"no row has both {prompt_key} and {answer_key}")
    return problems, dropped


def _find(row: dict[str, Any], names: tuple[str, ...], option: str) -> str:
    for name in names:
        if name in row:
            return name
    raise BadFile(f"none of {', '.join(names)} is among its fields {', '.join(row)}; name the field with {option}")


def _text(value: Any) -> str:
    """Return the text of a field: a string, the last message of a chat, or the ground truth of a reward entry."""
    if isinstance(value, dict):
        return _text(value.get("ground_truth", value.get("content")))
    if isinstance(value, list):
        return _text(value[-1]) if value else ""
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _rate(value: Any) -> float | None:
    """Read a share of right answers: a number, `7/8`, or a list of scores. Returns None for anything else."""
    if isinstance(value, list) and value and all(isinstance(score, bool | int | float) for score in value):
        return sum(score >= 1 for score in value) / len(value)
    right, _, of = str(value).partition("/")
    try:
        rate = float(right) / float(of or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return rate if 0 <= rate <= 1 else None


def _ask(prompt: str, instruction: str) -> str:
    """Return the problem with the chosen instruction. `keep` keeps the published one."""
    if instruction == "keep":
        return prompt
    for before, after in WRAPPINGS:
        prompt = prompt.removeprefix(before).removesuffix(after)
    return prompt.strip() + INSTRUCTIONS[instruction]


if __name__ == "__main__":
    sys.exit(main())
