"""A server's guard, and what it says when it cannot start."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from gspo_megatron.transport.auth import KEY_VARIABLE
from tests.rollout.conftest import Server, server_command
from tests.rollout.tiny import KEY
from tests.waiting import HANG


def test_every_path_but_health_asks_for_the_key(server: Server) -> None:
    guarded = [("POST", "/pause"), ("POST", "/collective_rpc"), ("GET", "/metrics"), ("POST", "/invocations")]
    for method, path in guarded:
        assert server.ask(method, path, key="wrong").status_code == 401
    assert server.ask("GET", "/weight_info").status_code == 200
    assert server.ask("GET", "/health", key="wrong").status_code == 200


def test_the_key_is_in_no_log_and_no_command_line(server: Server) -> None:
    assert KEY not in server.log.read_text()
    assert KEY.encode() not in Path(f"/proc/{server.process.pid}/cmdline").read_bytes()


def start_and_fail(run_dir: Path, port: int, key: str | None = KEY) -> str:
    """Last line of a server that cannot start."""
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    if key is not None:
        environment[KEY_VARIABLE] = key
    done = subprocess.run(server_command(run_dir, port), env=environment, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def test_a_used_port_is_one_sentence(run_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = start_and_fail(run_dir, port)
    assert said == f"cannot listen on 127.0.0.1:{port}: address already in use; choose a free port of this host"


def test_a_model_without_config_is_one_sentence(run_dir: Path, tmp_path: Path) -> None:
    shutil.copy(run_dir / "recipe.resolved.yaml", tmp_path)
    said = start_and_fail(tmp_path, 0)
    assert said == f"rollout server 0: {tmp_path}/model/config.json does not exist; write the model there first"


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_nothing_starts(run_dir: Path, key: str | None) -> None:
    assert start_and_fail(run_dir, 0, key).startswith("GSPO_JOB_KEY is not set")
