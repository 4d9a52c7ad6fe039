"""kill -9 of a server leaves nothing behind. Runs last: it ends the server that the other tests share."""

from __future__ import annotations

import signal
import time

import psutil

from tests.processes import runs
from tests.rollout.conftest import Server, answers


def test_kill_9_of_the_api_process_leaves_no_process(server: Server) -> None:
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children, "vLLM runs its engine in a process of its own"
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    _, alive = psutil.wait_procs([child for child in children if runs(child.pid)], timeout=5)
    deadline = time.monotonic() + 5
    while any(runs(child.pid) for child in alive) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [child.cmdline() for child in alive if runs(child.pid)] == []
    assert not answers(server.url)
