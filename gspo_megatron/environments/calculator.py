"""A calculator: the text of a call is arithmetic, which a process of its own evaluates."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspo_megatron.config.loading import refuse
from gspo_megatron.config.long_responses import EnvironmentSection
from gspo_megatron.environments.environment import TokenCodec, Turn
from gspo_megatron.types import Problem

PROGRAM = Path(__file__).with_name("arithmetic.py")
SECONDS = 5.0
"""Wall time of one call, the start of its process included; its own processor time is limited to 1 s."""
MAX_CHARACTERS = 1000
"""Of an expression; more is not evaluated."""
MAX_OUTPUT = 4096
"""Bytes that a process may say; one that says more is ended."""
ERROR = "error"
"""Result of everything that has none."""


class Calculator:
    """`reset` begins nothing: every call stands for itself. The state counts the calls."""

    def __init__(self, section: EnvironmentSection, tokenizer: TokenCodec) -> None:
        """Raises RecipeError where the tokenizer cannot write what a reply may hold."""
        self._section, self._tokenizer = section, tokenizer
        try:
            for result in (ERROR, "-0123456789.e+"):
                self._reply(result)
        except ValueError as error:
            raise refuse(
                "reply-not-writable", "environment.reply", f"{error}", "choose words that the vocabulary has"
            ) from None

    def reset(self, problem: Problem) -> int:
        """No call yet."""
        return 0

    def step(self, state: Any, action: Sequence[int]) -> Turn:
        """The value of the expression in the turn's call, in the words of `environment.reply`."""
        section = self._section
        text = self._tokenizer.decode(action).removesuffix(section.call_end)
        _, start, call = text.rpartition(section.call_start) if section.call_start else ("", " ", text)
        return Turn(tuple(self._reply(calculate(call) if start else ERROR)), state + 1)

    def _reply(self, result: str) -> list[int]:
        return self._tokenizer.encode_text(self._section.reply.replace("{result}", result))


def calculate(expression: str) -> str:
    """The value of an arithmetic expression as text; `error` where it has none, takes too long or grows too large."""
    if len(expression) > MAX_CHARACTERS:
        return ERROR
    said = run_program([sys.executable, "-I", "-S", str(PROGRAM)], expression.strip().encode(), SECONDS, MAX_OUTPUT)
    return ERROR if said is None else said.decode(errors="replace").strip() or ERROR


def run_program(command: Sequence[str], given: bytes, seconds: float, most: int) -> bytes | None:
    """What a program writes to its standard output; None if it fails, takes too long or writes more than `most` bytes.

    Args:
        command: the program; it gets no environment, no descriptor but three pipes, and confines itself.
        given: its standard input, less than a pipe holds.
        seconds: wall time.
        most: bytes of output.
    """
    deadline, said = time.monotonic() + seconds, b""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, cwd="/"
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(given)
            process.stdin.close()
            with selectors.DefaultSelector() as waiting:
                waiting.register(process.stdout, selectors.EVENT_READ)
                while waiting.select(max(0.0, deadline - time.monotonic())):
                    part = os.read(process.stdout.fileno(), most + 1)
                    said += part
                    if not part or len(said) > most:
                        break
                else:
                    return None
            finished = len(said) <= most and process.wait(max(0.0, deadline - time.monotonic())) == 0
            return said if finished else None
        except (BrokenPipeError, subprocess.TimeoutExpired):
            return None
        finally:
            process.kill()
