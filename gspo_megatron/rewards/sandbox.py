"""Runs Python code of a response in a process that can neither harm the machine nor outlive its time."""

from __future__ import annotations

import contextlib
import glob
import os
import selectors
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from gspo_megatron.rewards.sandbox_program import UNCONFINED

PROGRAM = Path(__file__).with_name("sandbox_program.py")
LOOK_SECONDS = 0.05
"""How often the files of a running program are counted."""
MOST_FILES = 1000


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use."""

    seconds: int = 5
    """Processor time."""
    wall_seconds: float = 30.0
    """By the clock: a program may sleep, and a busy machine gives it a share of a core."""
    memory_bytes: int = 1 << 30
    """Address space, Python included."""
    disk_bytes: int = 64 << 20
    """Of one file, and of all files in its directory."""
    output_bytes: int = 64 << 10
    """Standard output and errors together."""


STANDARD = Limits()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    code: int
    """Exit code; negative = the signal that ended it, -24 (SIGXCPU) at the limit of processor time."""
    output: str
    """Standard output and errors, cut at `output_bytes`."""
    stopped: str = ""
    """Why it was ended from outside: `wall`, `output` or `disk`; empty = it ended by itself."""


def run_code(source: str, limits: Limits = STANDARD) -> Outcome:
    """Run Python source as a program of its own, in an empty directory that is removed afterwards.

    It has the standard library and the installed packages, no environment, no network, no other processes, and no
    files but Python's to read and its directory to write.

    Raises:
        OSError: the kernel cannot confine it: no Landlock (Linux 5.13), or no seccomp.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="gspo-sandbox-"))
        ready, theirs = (
            stack.enter_context(os.fdopen(end, mode, 0)) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
        )
        numbers = (limits.memory_bytes, limits.seconds, limits.disk_bytes, theirs.fileno())
        command = [sys.executable, "-I", str(PROGRAM), directory, *map(str, numbers)]
        given = Path(directory, "source")
        given.write_bytes(source.encode(errors="replace"))
        with given.open("rb") as opened:
            given.unlink()
            process = subprocess.Popen(
                command, stdin=opened, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=directory,
                env={"PYTHONIOENCODING": "utf-8", "HOME": directory, "TMPDIR": directory}, start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        theirs.close()
        with process:
            try:
                output, stopped = _watch(process, directory, limits)
            finally:
                # Its threads end with it, and it has no other processes; the group is the whole of it.
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        confined = ready.read(1)
    text = output[: limits.output_bytes].decode(errors="replace")
    if not confined and code == UNCONFINED:
        raise OSError(f"this machine cannot confine code of a response: {text.strip()}; it needs Landlock and seccomp")
    return Outcome(code, text, stopped)


def _watch(process: subprocess.Popen[bytes], directory: str, limits: Limits) -> tuple[bytes, str]:
    """Read the output until its end or a limit. Returns it and the limit."""
    deadline, output = time.monotonic() + limits.wall_seconds, b""
    assert process.stdout is not None
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        while True:
            if waiting.select(LOOK_SECONDS):
                part = os.read(process.stdout.fileno(), 1 << 16)
                output += part
                if not part:
                    return output, _wait(process, directory, deadline, limits)
            if len(output) > limits.output_bytes:
                return output, "output"
            if fault := _overstep(process.pid, directory, deadline, limits):
                return output, fault


def _wait(process: subprocess.Popen[bytes], directory: str, deadline: float, limits: Limits) -> str:
    """Wait for the end of a program that has closed its output."""
    while True:
        try:
            process.wait(LOOK_SECONDS)
            return ""
        except subprocess.TimeoutExpired:
            if fault := _overstep(process.pid, directory, deadline, limits):
                return fault


def _overstep(pid: int, directory: str, deadline: float, limits: Limits) -> str:
    """The limit that a program is beyond, of those that the kernel does not watch; or an empty text."""
    if time.monotonic() > deadline:
        return "wall"
    # It cannot make directories. A file may be gone before it is looked at.
    count, size = 0, _nameless_bytes(pid)
    with os.scandir(directory) as entries:
        for entry in entries:
            count += 1
            with contextlib.suppress(OSError):
                size += entry.stat(follow_symlinks=False).st_blocks * 512
            if count > MOST_FILES:
                break
    return "disk" if count > MOST_FILES or size > limits.disk_bytes else ""


def _nameless_bytes(pid: int) -> int:
    """Bytes of files without a name that a process holds open. One that is mapped only counts as its memory."""
    sizes: dict[tuple[int, int], int] = {}
    # Each thread: the first may have ended.
    for opened in glob.iglob(f"/proc/{pid}/task/*/fd/*"):
        with contextlib.suppress(OSError):
            found = os.stat(opened)
            if stat.S_ISREG(found.st_mode) and not found.st_nlink:
                sizes[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())
