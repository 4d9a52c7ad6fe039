"""The calculator: what it says in ids, and that what a model writes reaches neither files nor network nor a limit."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.long_responses import EnvironmentSection
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.environments import make_step, read_call_ids
from gspo_megatron.environments.calculator import PROGRAM, calculate, run_program
from gspo_megatron.models import load_recipe
from gspo_megatron.types import Problem

PROBLEM = Problem("p", "q", {})
SECTION = EnvironmentSection(name="calculator", call_start="<", call_end=">", reply="[{result}]")


class Letters:
    """One id a character."""

    def encode_text(self, text: str) -> list[int]:
        if "~" in text:
            raise ValueError("'~' is not in the vocabulary")
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def no_messages(messages: object, last_id: int) -> list[int]:
    raise AssertionError("the calculator writes no messages")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3 + 4*2", "11"),
        (" (879+974)**2 - 1 ", "3433608"),
        ("7/2", "3.5"),
        ("-7//2", "-4"),
        ("2**127", str(2**127)),
        ("0.1+0.2", "0.3"),
        ("1/3", "0.333333333333"),
    ],
)
def test_it_calculates(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "", "1/0", "(1", "2**300", "10**5000", "__import__('os').system('true')", "x", "'a'*9", "[1]*9",
        "1 if 1 else 2", "(-8)**0.5", "1e999", "True+1", "+" * 900 + "1" + "0" * 200, "1" * 5000, "\0",
        "(" * 400 + ")" * 400,
    ],
)  # fmt: skip
def test_what_is_no_short_number_is_an_error(expression: str) -> None:
    assert calculate(expression) == "error"


def test_time_and_memory_end() -> None:
    assert calculate("9**9**9") == "error"
    assert calculate("10**" + "9" * 30) == "error"


def confined(*lines: str) -> list[str]:
    """A program that confines itself as the calculator's does, and what `run_program` makes of it."""
    body = "\n".join(lines)
    program = f"import runpy, socket, subprocess, os, sys\nrunpy.run_path({str(PROGRAM)!r})['confine']()\n{body}"
    return [sys.executable, "-I", "-c", textwrap.dedent(program)]


def test_it_gets_neither_network_nor_files() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        address = listener.getsockname()
        tries = (
            f"socket.create_connection({address!r}, 2)", "open('/etc/passwd')", "os.pipe()",
            # Closing what is open makes no room: the limit is below the lowest number.
            f"(os.close(0), os.close(2), socket.create_connection({address!r}, 2))",
        )  # fmt: skip
        for attempt in tries:
            said = run_program(
                confined("try:", f"    {attempt}; print('out')", "except OSError as e: print(e.errno)"), b"", 20, 99
            )
            assert said == b"24\n", attempt
        with pytest.raises(TimeoutError):
            listener.accept()


def test_without_the_confinement_the_same_program_gets_out() -> None:
    """So that the test above can fail."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        call = f"import socket; socket.create_connection({listener.getsockname()!r}, 2); print('out')"
        assert run_program([sys.executable, "-I", "-c", call], b"", 20, 99) == b"out\n"


def test_output_and_waiting_are_bounded() -> None:
    endless = "import sys\nwhile True: sys.stdout.write('x' * 65536)"
    assert run_program([sys.executable, "-I", "-c", endless], b"", 20, 4096) is None
    assert run_program([sys.executable, "-I", "-c", "import time; time.sleep(3600)"], b"", 0.5, 99) is None
    assert run_program([sys.executable, "-I", "-c", "import os; os.close(1); input()"], b"", 3, 99) is None
    assert run_program([sys.executable, "-I", "-c", "print(1); exit(3)"], b"", 20, 99) is None


def test_the_program_confines_itself_before_it_reads() -> None:
    source = PROGRAM.read_text()
    main = source[source.index("__main__") :]
    assert main.index("confine()") < main.index("stdin.read()")
    # Its own process shows the limits: an endless sum of processor time is ended by the kernel, not by the clock.
    done = subprocess.run([sys.executable, "-I", "-S", str(PROGRAM)], input=b"9**9**9", capture_output=True)
    assert done.returncode < 0


def test_a_step_is_ids_in_and_ids_out() -> None:
    step, codec = make_step(SECTION, Letters(), no_messages), Letters()
    turn = step(PROBLEM, None, codec.encode_text("so <1+1>"))
    assert codec.decode(turn.token_ids) == "[2]" and turn.state == 1
    again = step(PROBLEM, turn.state, codec.encode_text("<1> or <2*21>"))
    assert codec.decode(again.token_ids) == "[42]" and again.state == 2, "the last call of a turn counts"
    assert codec.decode(step(PROBLEM, 2, codec.encode_text("2*21>")).token_ids) == "[error]", "there was no call"
    whole = make_step(SECTION.model_copy(update={"call_start": ""}), codec, no_messages)
    assert codec.decode(whole(PROBLEM, None, codec.encode_text("2*21>")).token_ids) == "[42]"


def test_a_tokenizer_that_does_not_fit_is_refused_by_name() -> None:
    assert read_call_ids(SECTION, Letters()) == (ord(">"),)
    with pytest.raises(RecipeError, match=r"environment.call_end: '=>' is 2 tokens"):
        read_call_ids(SECTION.model_copy(update={"call_end": "=>"}), Letters())
    with pytest.raises(RecipeError, match=r"environment.reply: '~' is not in the vocabulary"):
        read_call_ids(SECTION.model_copy(update={"reply": "~{result}"}), Letters())
    shipped = load_recipe(Path("recipes/tiny_moe.yaml")).tokenizer
    tokenizer = load_tokenizer(shipped, None)
    fitting = SECTION.model_copy(update={"call_end": "=", "reply": " {result} "})
    assert len(read_call_ids(fitting, tokenizer)) == 1
