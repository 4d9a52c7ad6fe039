"""A server of several is started again on its node; what ended it for good is what its task ends with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEEP = "import json, sys; from launch.lib.task import keep; keep(*json.loads(sys.argv[1]))"
SERVER = """
import os, signal, socket, sys, time
starts, port, end = sys.argv[1:]
open(starts, "a").write("started\\n")
if end == "at once":
    sys.exit(3)
listener = socket.create_server(("127.0.0.1", int(port)))
if end == "killed":
    listener.accept()
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
signal.pause()
"""


def start(starts: Path, end: str) -> subprocess.Popen[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    task = {"name": "rollout-1", "restarts": 2, "ports": [port]}
    job = json.dumps([[sys.executable, "-c", SERVER, str(starts), str(port), end], task, "127.0.0.1"])
    return subprocess.Popen([sys.executable, "-c", KEEP, job], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_lost_server_is_started_again_until_it_was_lost_too_often(tmp_path: Path) -> None:
    task = start(tmp_path / "starts", "killed")
    said, _ = task.communicate(timeout=60)
    assert task.returncode == -signal.SIGKILL, "srun must say what happened to the server"
    assert said.splitlines() == [f"gspo: rollout-1 ended and is started again; {left} more times" for left in (1, 0)]
    assert len((tmp_path / "starts").read_text().split()) == 3


def test_a_server_that_never_served_is_not_started_again(tmp_path: Path) -> None:
    task = start(tmp_path / "starts", "at once")
    assert task.wait(timeout=60) == 3
    assert len((tmp_path / "starts").read_text().split()) == 1


def test_a_server_that_is_asked_to_end_ends(tmp_path: Path) -> None:
    task = start(tmp_path / "starts", "never")
    deadline = time.monotonic() + 60
    while not (tmp_path / "starts").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)  # so that it has served
    os.kill(task.pid, signal.SIGTERM)
    assert task.wait(timeout=60) == -signal.SIGTERM
    assert len((tmp_path / "starts").read_text().split()) == 1
