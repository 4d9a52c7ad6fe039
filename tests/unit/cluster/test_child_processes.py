"""Processes die with the one that started them; the guard knows one key."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from gspo_megatron.transport.auth import KeyGuard, has_key, key_header, read_key
from tests.processes import runs
from tests.waiting import wait_until

FAMILY = """
import os, time
from gspo_megatron.cluster.child_processes import bind_forked_children
bind_forked_children()
child = os.fork()
if child == 0:
    grandchild = os.fork()
    os.write(1, f"{os.getpid()}\\n".encode())  # one write: two print at the same time
time.sleep(3600)
"""


def test_a_killed_process_takes_its_descendants_along() -> None:
    parent = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    family = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(runs(pid) for pid in family)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(runs(pid) for pid in family), "end of the descendants")


def test_an_orphan_ends_at_once() -> None:
    """The parent named is not the parent any more: the call came too late for the kernel's signal."""
    program = "from gspo_megatron.cluster.child_processes import die_with_parent; die_with_parent(1); print('alive')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""


async def ask_guard(scope: dict[str, Any]) -> list[Any]:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append("served")

    async def send(message: dict[str, Any]) -> None:
        seen.append(message.get("status", message["type"]))

    async def receive() -> None:
        return None

    await KeyGuard(app)({"headers": [], "path": "/pause", **scope}, receive, send)
    return seen


async def test_the_guard_lets_only_the_key_and_health_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSPO_JOB_KEY", "secret")
    right = [(b"authorization", b"Bearer secret")]
    assert await ask_guard({"type": "http", "headers": right}) == ["served"]
    assert (await ask_guard({"type": "http"}))[0] == 401
    assert (await ask_guard({"type": "http", "headers": [(b"authorization", b"Bearer secre")]}))[0] == 401
    assert (await ask_guard({"type": "http", "headers": [(b"authorization", b"Bearer \xff")]}))[0] == 401
    assert await ask_guard({"type": "http", "path": "/health"}) == ["served"]
    assert (await ask_guard({"type": "http", "path": "/health/../pause"}))[0] == 401
    assert await ask_guard({"type": "websocket", "path": "/health"}) == ["websocket.close"]
    assert await ask_guard({"type": "websocket", "headers": right}) == ["websocket.close"]
    assert await ask_guard({"type": "lifespan"}) == ["served"]


def test_no_key_no_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "GSPO_JOB_KEY", "")
    with pytest.raises(SystemExit, match="GSPO_JOB_KEY is not set"):
        read_key()
    assert not has_key({}, "") and has_key(key_header("k"), "k")
