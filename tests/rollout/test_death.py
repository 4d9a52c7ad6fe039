"""kill -9 of a server leaves nothing behind. Runs last: it ends the server that the other tests share."""

from __future__ import annotations

import signal

import psutil

from tests.processes import runs
from tests.rollout.conftest import Server, answers
from tests.waiting import wait_until


def test_kill_9_of_the_api_process_leaves_no_process(server: Server) -> None:
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children, "vLLM runs its engine in a process of its own"
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    wait_until(lambda: not any(runs(child.pid) for child in children), f"end of {children}")
    assert not answers(server.url)
