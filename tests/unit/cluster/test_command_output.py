"""A tool that does not answer, fails or is not there has printed nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gspo_megatron.cluster import visible_devices
from gspo_megatron.cluster.command_output import read_command
from tests.waiting import wait_until

SILENT = """#!/bin/sh
echo $$ > {pid}
echo "GPU-1, NVIDIA H100 80GB HBM3"
exec sleep 3600
"""


def test_what_is_not_there_or_fails_has_printed_nothing() -> None:
    assert read_command("no-such-program") == ""
    assert read_command("sh", "-c", "echo half; exit 3") == ""
    assert read_command("sh", "-c", "echo whole") == "whole\n"


def test_a_driver_that_never_answers_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, pid = tmp_path / "nvidia-smi", tmp_path / "pid"
    tool.write_text(SILENT.format(pid=pid))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert visible_devices.query_gpus("name", timeout=1.0) == []
    if pid.exists():
        wait_until(lambda: is_over(int(pid.read_text())), "end of the silent tool")


def is_over(pid: int) -> bool:
    """Gone, or an end that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
