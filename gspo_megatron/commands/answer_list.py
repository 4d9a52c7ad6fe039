"""The command `gspo answers`: reads, filters and exports the responses of a run or of an evaluation."""

from __future__ import annotations

import argparse
import heapq
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, get_args

from gspo_megatron.cluster.exit_codes import OK, REFUSED
from gspo_megatron.config.recipe_paths import read_path
from gspo_megatron.report.answer_reader import NO_STEP, AnswerFilter, AnswerReader
from gspo_megatron.run_dir import RunDir
from gspo_megatron.types import StopReason, printable

SHOWN = 5
"""Responses on the terminal, unless more are asked for."""


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `answers` command to the parser."""
    parser = subparsers.add_parser("answers", help="read, filter and export the responses of a run")
    parser.add_argument("run_dir", type=read_path, help="directory of `gspo train` or `gspo eval`, also while it runs")
    parser.add_argument("--step", type=read_interval, metavar="A[:B]", help="steps, both ends included")
    parser.add_argument("--reward", type=read_interval, metavar="LOW:HIGH", help="rewards, both ends included")
    parser.add_argument("--clipped", action="store_true", help="only responses cut at the limit")
    parser.add_argument("--stop-reason", choices=get_args(StopReason), help="only responses that ended so")
    parser.add_argument("--contains", default="", metavar="TEXT", help="only questions that hold this text")
    parser.add_argument("--longest", type=_positive, metavar="N", help="only the N longest, longest first")
    parser.add_argument("--show", type=_positive, metavar="N", help=f"responses to print ({SHOWN})")
    parser.add_argument("--export", metavar="FILE", help="write all of them as JSONL to a new file; - prints them")


def read_interval(text: str) -> tuple[float, float]:
    """Read `A`, `A:B`, `A:` or `:B`."""
    low, colon, high = text.partition(":")
    high = high if colon else low
    try:
        found = (float(low) if low else -math.inf, float(high) if high else math.inf)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no interval; write 3 or 2:5") from None
    if not (text and found[0] <= found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no interval; give the low end first")
    return found


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def run(chosen: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    reasons = {"length"} if chosen.clipped else set(get_args(StopReason))
    reasons &= {chosen.stop_reason} if chosen.stop_reason else reasons
    everything = AnswerFilter()
    wanted = AnswerFilter(
        chosen.step or everything.steps, chosen.reward or everything.rewards, frozenset(reasons), chosen.contains
    )
    try:
        return list_answers(RunDir(chosen.run_dir), wanted, chosen.longest, chosen.show or SHOWN, chosen.export)
    except BrokenPipeError:
        sys.stderr.close()  # the reader, e.g. head, has enough
        return OK
    except FileExistsError as error:
        print(f"{error.filename} exists already; name a new file for --export", file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or chosen.run_dir}: {error.strerror or error}", file=sys.stderr)
    except ValueError as error:
        print(f"{chosen.run_dir}: {error}", file=sys.stderr)
    return REFUSED


def list_answers(run: RunDir, wanted: AnswerFilter, longest: int | None, show: int, export: str | None) -> int:
    """Print or export responses.

    Args:
        run: directory of a run or of an evaluation.
        wanted: which responses.
        longest: only so many, longest first; None = all in order.
        show: responses to print without an export.
        export: new JSONL file, or `-`; None = none.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a file of the directory is broken.
    """
    if not (run.recipe.is_file() and (run.samples.is_dir() or run.answers.is_file())):
        print(f"{run.path} holds no responses; give the directory of a run or of an evaluation", file=sys.stderr)
        return REFUSED
    reader = AnswerReader(run, wanted)
    found = reader.read()
    if longest is not None:
        found = iter(heapq.nlargest(longest, found, key=lambda answer: answer["tokens"]))
    if export is not None:
        with _open_export(export) as file:
            count = sum(1 for answer in found if file.write(json.dumps(answer) + "\n"))
    else:
        count = 0
        for answer in islice(found, show):
            count += 1
            print(describe(answer))
        count += sum(1 for _ in found)
    gone = f"; {reader.gone} more are no longer on the disk" if reader.gone else ""
    print(f"{count} responses{gone}", file=sys.stderr)
    return OK


@contextmanager
def _open_export(name: str) -> Iterator[IO[str]]:
    """Open a new file, or standard output. Raises FileExistsError: nothing is written over."""
    if name == "-":
        yield sys.stdout
    else:
        with Path(name).expanduser().open("x", encoding="ascii") as file:
            yield file


def describe(answer: dict[str, Any]) -> str:
    """A response for the terminal."""
    step = "" if answer["step"] == NO_STEP else f"step {answer['step']}  "
    unscored = f" (no score of its own: {answer['unscored']})" if answer["unscored"] else ""
    head = f"{step}prompt {answer['prompt']}  sample {answer['sample']}  reward {answer['reward']:g}{unscored}  "
    head += f"{answer['tokens']} tokens  ended by {answer['stop_reason']}"
    return "\n".join([head, *_indented(answer["question"]), "  ->", *_indented(answer["response"]), ""])


def _indented(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        yield f"  {printable(line, keep='\t')}"
