"""A calculator: a call is an arithmetic expression, which a separate process evaluates."""

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
"""Wall time of one call, start of the process included. Processor time is limited to 1 s."""
MAX_CHARACTERS = 1000
"""Most characters of an expression. A longer one is an error."""
MAX_OUTPUT = 4096
"""Most bytes of a process's output. A process that writes more is killed."""
ERROR = "error"
"""Result of a call without a value."""


class Calculator:
    """Evaluates the expression of each call. Calls are independent; the state is the number of calls so far."""

    def __init__(self, section: EnvironmentSection, tokenizer: TokenCodec) -> None:
        """Check that the tokenizer can write every reply. Raises RecipeError if it cannot."""
        self._section, self._tokenizer = section, tokenizer
        try:
            for result in (ERROR, "-0123456789.e+"):
                self._reply(result)
        except ValueError as error:
            raise refuse(
                "reply-not-writable", "environment.reply", f"{error}", "use characters that the vocabulary has"
            ) from None

    def reset(self, problem: Problem) -> int:
        """Return the state of a new response: no calls."""
        return 0

    def step(self, state: Any, action: Sequence[int]) -> Turn:
        """Evaluate the expression in the turn's call and format it with `environment.reply`."""
        section = self._section
        text = self._tokenizer.decode(action).removesuffix(section.call_end or "")
        _, start, call = text.rpartition(section.call_start) if section.call_start else ("", " ", text)
        return Turn(tuple(self._reply(calculate(call) if start else ERROR)), state + 1)

    def _reply(self, result: str) -> list[int]:
        return self._tokenizer.encode_text(self._section.reply.replace("{result}", result))


def calculate(expression: str) -> str:
    """Return the value of an expression as text, or `error` if it has none, takes too long or is too large."""
    if len(expression) > MAX_CHARACTERS:
        return ERROR
    output = run_program([sys.executable, "-I", "-S", str(PROGRAM)], expression.strip().encode(), SECONDS, MAX_OUTPUT)
    return ERROR if output is None else output.decode(errors="replace").strip() or ERROR


def run_program(command: Sequence[str], given: bytes, seconds: float, most: int) -> bytes | None:
    """Return the standard output of a program, or None if it fails, takes too long or writes more than `most` bytes.

    Args:
        command: the program. It gets an empty environment and no descriptor but three pipes, and confines itself.
        given: standard input, smaller than a pipe's buffer.
        seconds: limit of wall time.
        most: limit of the output, bytes.
    """
    deadline, output = time.monotonic() + seconds, b""
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
                    output += part
                    if not part or len(output) > most:
                        break
                else:
                    return None
            finished = len(output) <= most and process.wait(max(0.0, deadline - time.monotonic())) == 0
            return output if finished else None
        except (BrokenPipeError, subprocess.TimeoutExpired):
            return None
        finally:
            process.kill()
