"""Code of a response in its sandbox: what it may do, and hostile programs, each bounded and gone afterwards."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from gspo_megatron.config.plugins import load_object
from gspo_megatron.rewards.reward_input import RewardInput
from gspo_megatron.rewards.sandbox import Limits, Outcome, run_code
from tests.places import ROOT
from tests.processes import runs

SMALL = Limits(seconds=1, wall_seconds=60.0, memory_bytes=256 << 20, disk_bytes=4 << 20, output_bytes=1000)


@pytest.fixture
def sandboxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


ALLOWED = {
    "print(1 + 1)": "2\n",
    "open('a', 'w').write('hi'); print(open('a').read())": "hi\n",
    "import threading as t; x = t.Thread(target=lambda: print('thread')); x.start(); x.join()": "thread\n",
    "import os; print(sorted(os.environ))": "['HOME', 'LC_CTYPE', 'PYTHONIOENCODING', 'TMPDIR']\n",
    "import collections, json, math, random, re; print(__name__)": "__main__\n",
    "import resource as r; r.setrlimit(7, (9, 9)); print(r.getrlimit(7))": "(9, 9)\n",
    "import fcntl, os; a, b = os.pipe(); print(fcntl.fcntl(a, 1), fcntl.fcntl(a, 3))": "1 0\n",
    "import tempfile as t\nwith t.NamedTemporaryFile('w+') as f, t.TemporaryFile() as g: print(f.write('x'))": "1\n",
    "import sqlite3; print(sqlite3.connect('d').execute('select 1').fetchall())": "[(1,)]\n",
    "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)": "True\n",
    "import os; print('97', flush=True); os._exit(0)": "97\n",
}


@pytest.mark.parametrize("code", ALLOWED)
def test_a_program_runs(code: str, sandboxes: Path) -> None:
    assert run_code(code, SMALL) == Outcome(0, ALLOWED[code])


SYSTEM_CALL = (
    "import ctypes, os; x86 = os.uname().machine == 'x86_64'; libc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.syscall({}, {}) < 0: raise OSError(ctypes.get_errno(), '')"
)
HOSTILE = {
    "import os\nwhile True: os.fork()": "Operation not permitted",
    "import subprocess; subprocess.run(['ls'])": "Operation not permitted",
    "import os; os.execv('/bin/sh', ['sh'])": "Operation not permitted",
    "import os; os.kill(os.getppid(), 9)": "Operation not permitted",
    "import socket; socket.create_connection(('127.0.0.1', 9))": "Operation not permitted",
    "import socket; socket.socketpair()": "Operation not permitted",
    "open('/tmp/escaped', 'w')": "Permission denied",
    "open('{OUTSIDE}', 'w')": "Permission denied",
    "print(open('{OUTSIDE}').read())": "Permission denied",
    "import os; os.unlink('{OUTSIDE}')": "Permission denied",
    "import os; os.mkdir('d')": "Permission denied",
    "import os; os.symlink('/etc', 'e')": "Permission denied",
    "from multiprocessing import shared_memory as s; s.SharedMemory(create=True, size=9)": "Permission denied",
    "import resource as r; r.setrlimit(r.RLIMIT_CPU, (99, 99))": "not allowed to raise maximum limit",
    "import resource as r, os; r.prlimit(os.getppid(), r.RLIMIT_NOFILE, (1, 1))": "Operation not permitted",
    "import os; os.setpriority(0, os.getppid(), 19)": "Operation not permitted",
    "import os; os.sched_setaffinity(os.getppid(), [0])": "Operation not permitted",
    "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())": "Operation not permitted",
    "import fcntl, os; fcntl.fcntl(os.pipe()[0], 10, 9)": "Operation not permitted",
    "import os; os.chmod('{OUTSIDE}', 0)": "Operation not permitted",
    "import os; os.chown('{OUTSIDE}', os.getuid(), os.getgid())": "Operation not permitted",
    "import os; os.utime('{OUTSIDE}')": "Operation not permitted",
    "import os; os.setxattr('{OUTSIDE}', 'user.a', b'b')": "Operation not permitted",
    "import os; os.fchmod(os.open('a', 66), 0)": "Operation not permitted",
    "import os; os.memfd_create('m')": "Operation not permitted",
    SYSTEM_CALL.format("129 if x86 else 138", "os.getppid(), 10, bytes(128)"): "PermissionError: [Errno 1]",
    SYSTEM_CALL.format(
        "297 if x86 else 240", "os.getppid(), os.getppid(), 10, bytes(128)"
    ): "PermissionError: [Errno 1]",
    SYSTEM_CALL.format("30 if x86 else 196", "0, 0, 0"): "PermissionError: [Errno 1]",
    "bytearray(8 << 30)": "MemoryError",
    "open('big', 'wb').write(b'x' * (8 << 20))": "File too large",
    "import threading as t\nwhile True: t.Thread(target=t.Event().wait, daemon=True).start()": "start new",
    "1 / 0": "ZeroDivisionError",
    "def": "SyntaxError",
}


@pytest.mark.parametrize("code", HOSTILE)
def test_a_hostile_program_is_refused_what_it_tries(code: str, sandboxes: Path) -> None:
    outside = sandboxes / "outside"
    outside.write_text("gold")
    outcome = run_code(code.replace("{OUTSIDE}", str(outside)), replace(SMALL, output_bytes=4000))
    assert outcome.code == 1 and not outcome.stopped and HOSTILE[code] in outcome.output
    assert [file.name for file in sandboxes.iterdir()] == ["outside"] and outside.read_text() == "gold"


ENDLESS = {
    "while True: pass": (-24, ""),
    "import signal\nsignal.signal(24, signal.SIG_IGN)\nwhile True: pass": (-9, ""),
    "import time; time.sleep(600)": (-9, "wall"),
    "import os, time; os.close(1); os.close(2); time.sleep(600)": (-9, "wall"),
    "while True: print('x' * 100)": (-9, "output"),
    "i = 0\nwhile True: i += 1; open(f'f{i}', 'w')": (-9, "disk"),
    "i = 0\nwhile True: i += 1; open(f'f{i}', 'wb').write(b'x' * (1 << 20))": (-9, "disk"),
    "import os; print(os.getpid(), flush=True); os.setsid()\nwhile True: pass": (1, ""),
    "while True: f = open('u', 'wb'); import os; os.unlink('u'); globals().setdefault('all', []).append(f); "
    "f.write(b'x' * (3 << 20)); f.flush()": (-9, "disk"),
    "import os, threading, ctypes\ndef fill():\n    held = []\n    for _ in range(50):\n"
    "        held.append(os.open('.', os.O_TMPFILE | os.O_RDWR)); os.write(held[-1], b'x' * (3 << 20))\n"
    "    threading.Event().wait()\n"
    "threading.Thread(target=fill).start(); ctypes.CDLL(None).pthread_exit(None)": (-9, "disk"),
    "import sys; sys.exit(3)": (3, ""),
    "import os; os._exit(97)": (97, ""),
    "import ctypes; ctypes.string_at(0)": (-11, ""),
}


@pytest.mark.parametrize("code", ENDLESS)
def test_an_endless_program_ends(code: str, sandboxes: Path) -> None:
    # Only a program that waits ends by the clock: the others get their processor time on a busy machine too.
    limits = replace(SMALL, wall_seconds=2.0) if ENDLESS[code][1] == "wall" else SMALL
    outcome = run_code("import os; print(os.getpid(), flush=True)\n" + code, limits)
    assert (outcome.code, outcome.stopped) == ENDLESS[code]
    assert len(outcome.output) <= SMALL.output_bytes and not runs(int(outcome.output.split()[0]))
    assert not list(sandboxes.iterdir())


def test_a_kernel_that_cannot_confine_is_a_sentence(monkeypatch: pytest.MonkeyPatch, sandboxes: Path) -> None:
    program = (ROOT / "gspo_megatron/rewards/sandbox_program.py").read_text()
    assert "_CAPSET = 444, " in program, "the number of the call that makes Landlock's rules"
    (sandboxes / "program.py").write_text(program.replace("_CAPSET = 444, ", "_CAPSET = 9999, "))
    monkeypatch.setattr("gspo_megatron.rewards.sandbox.PROGRAM", sandboxes / "program.py")
    with pytest.raises(OSError, match=r"cannot confine code of a response: .*; it needs Landlock"):
        run_code("print(1)", SMALL)


UNIT_TESTS = {"prompt": "Write add.", "answer": "", "tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}


@pytest.mark.parametrize(
    ("answer", "passed", "ended"),
    [
        ("So:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1.0, 1.0),
        ("```python\ndef add(a, b):\n    return 0\n```", 0.5, 1.0),
        ("```python\nbroken\n```\n```python\ndef add(a, b): return a + b\n```", 1.0, 1.0),
        ("def add(a, b): return a + b", 1.0, 1.0),
        ("I cannot.", 0.0, 1.0),
        ("```python\nimport os; os._exit(0)\n```", 0.0, 1.0),
        ("```python\nprint('passed 0')\ndef add(a, b): raise SystemExit\n```", 0.0, 1.0),
        ("```python\nwhile True: print('x' * 9999)\n```", 0.0, 0.0),
    ],
)
def test_the_example_runs_the_tests_of_a_problem(answer: str, passed: float, ended: float) -> None:
    score = load_object(f"{ROOT}/recipes/rewards/unit_tests.py:score")
    response = RewardInput(answer, answer, (1,), "stop")
    assert score(UNIT_TESTS, response) == {"passed": passed, "_ended": ended}
