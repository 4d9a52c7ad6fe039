"""`recipes/your_own/README.md`, followed to the letter from an empty folder, with the sampler and the trainer real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.first_day.page import Block, read_blocks
from tests.places import ROOT
from tests.rollout.jobs import DEAD_PROXY, wait_for
from tests.waiting import HANG

PAGE = ROOT / "recipes" / "your_own" / "README.md"
BIN = Path(sys.executable).parent
INTERRUPTED = "# press Ctrl-C after a step"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("your own")  # with a blank in its name


def environment() -> dict[str, str]:
    """What a shell has after the first block of the page."""
    return {**os.environ, **DEAD_PROXY, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def start(command: str, folder: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, shell=True, cwd=folder, env=environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def run(command: str, folder: Path) -> str:
    """A command that must succeed; what it printed."""
    process = start(command, folder)
    printed, _ = process.communicate(timeout=HANG)
    assert process.returncode == 0, f"{command}\n{printed[-4000:]}"
    return printed


def interrupt(command: str, folder: Path, run_dir: Path) -> str:
    """A run that gets Ctrl-C once it has finished a step."""
    process = start(command, folder)
    wait_for(process, "a finished step", lambda: len(steps(run_dir)) > 1)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=HANG)
    assert process.returncode == -signal.SIGINT, printed[-4000:]
    return printed


def steps(run_dir: Path) -> list[int]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def last_row(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])


def follow(block: Block, folder: Path) -> str:
    """Write the file, or run the commands."""
    if block.name:
        (folder / block.name).write_text(block.text)
    printed = ""
    for command in block.commands:
        if command.endswith(INTERRUPTED):
            printed += interrupt(command.partition("#")[0].strip(), folder, folder / "runs" / "one")
        else:
            printed += run(command, folder)
    return printed


def test_the_page(folder: Path) -> None:
    blocks = read_blocks(PAGE)[1:]
    for block in blocks:
        print(f"--- {block.heading} {block.name}\n{follow(block, folder)}")
    assert steps(folder / "runs" / "one") == [0, 1, 2, 3, 4, 5]
    environment, agent = (last_row(folder / "runs" / name) for name in ("two", "three"))
    assert "reward/turns" in environment and "reward/digits" not in environment, "the environment scores"
    assert agent["agent_turns"] > 1.0, "the agent comes to its second request"
