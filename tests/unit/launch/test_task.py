"""A server of several is started again on its node; what ended it for good is what its task ends with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.places import ROOT

KEEP = "import json, sys; from launch.lib.task import keep; keep(*json.loads(sys.argv[1]))"
SERVER = """
import os, signal, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
folder, port, end = sys.argv[1:]
open(f"{folder}/starts", "a").write("started\\n")
if end.isdigit():
    sys.exit(int(end))
def go():
    os.kill(os.getpid(), signal.SIGKILL) if end == "killed" else os._exit(0)
if end in ("killed", "leaves"):
    threading.Timer(6.0, go).start()  # where nobody asks any more
class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        open(f"{folder}/served", "w").close()
        if end in ("killed", "leaves"):
            threading.Timer(0.2, go).start()
HTTPServer(("127.0.0.1", int(port)), Health).serve_forever()
"""


@contextmanager
def keeping(folder: Path, end: str, restarts: int = 2) -> Iterator[subprocess.Popen[str]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    row = {"name": "rollout-1", "restarts": restarts, "ports": [port] if restarts else []}
    job = json.dumps([[sys.executable, "-c", SERVER, str(folder), str(port), end], row, "127.0.0.1"])
    # In a group of its own, so that nothing is left where a test fails.
    task = subprocess.Popen(
        [sys.executable, "-c", KEEP, job], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield task
    finally:
        with suppress(ProcessLookupError):
            os.killpg(task.pid, signal.SIGKILL)
        task.wait()


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().split())


def again(left: int) -> str:
    return f"gspo: rollout-1 ended and is started again; {left} more times"


@pytest.mark.parametrize(("end", "code"), [("killed", -signal.SIGKILL), ("leaves", 1)])
def test_a_lost_server_is_started_again_until_it_was_lost_too_often(tmp_path: Path, end: str, code: int) -> None:
    with keeping(tmp_path, end) as task:
        said, _ = task.communicate(timeout=120)
        assert task.returncode == code, "srun must say what happened to the server"
    alone = ["rollout-1 ended without being asked to; its engine's last words are above"] if code == 1 else []
    assert said.splitlines() == [again(1), again(0), *alone]
    assert starts(tmp_path) == 3


@pytest.mark.parametrize(("restarts", "end", "code"), [(2, "3", 3), (2, "0", 1), (0, "3", 3), (0, "0", 1)])
def test_what_never_served_or_cannot_come_back_alone_is_a_failure(
    tmp_path: Path, restarts: int, end: str, code: int
) -> None:
    with keeping(tmp_path, end, restarts) as task:
        assert task.wait(timeout=60) == code, "a code of 0 would be no fault to srun"
    assert starts(tmp_path) == 1
