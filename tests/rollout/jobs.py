"""Jobs with every process real: how they are started, found, waited for and seen to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.places import ROOT
from tests.waiting import HANG, wait_until

PROMPTS, ANSWERS = 8, 4
SMALL = (
    "cold_start.steps=3", "cold_start.batch_size=8", f"batch.prompts={PROMPTS}", f"batch.answers={ANSWERS}",
    "trainer.max_steps=3", "evaluation.problems=16", "evaluation.every=0", "data.held_out=32",
    "rollout.kv_cache_gib=0.0625",
    # Three steps of fine-tuning leave the weights near their start, where everything is uniform; wider ones are not.
    "model.architecture.initializer_range=0.1", "optimizer.lr=3e-3", "optimizer.warmup_updates=0",
)  # fmt: skip
SERVER, CONTROLLER, TRAINER = (
    f"gspo_megatron.{module}" for module in ("inference.server", "controller.main", "trainer.loop")
)
"""What the command line of each role holds."""
DEAD_PROXY = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
"""Nothing of a run may go through a proxy of the site: this one refuses every connection."""


def start(
    directory: Path, *more: str, module: str = "gspo_megatron.cli", recipe: str = "recipes/tiny_moe.yaml"
) -> subprocess.Popen[str]:
    """The job of a recipe with the recipe keys of `SMALL` and `more`; `directory`/run is its run directory."""
    overrides = [*SMALL, *more, f"run.directory={directory / 'run'}", f"cold_start.cache={directory / 'cold_start'}"]
    command = [sys.executable, "-m", module, "train", recipe, *overrides]
    environment = {**os.environ, **DEAD_PROXY}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(job: subprocess.Popen[str]) -> str:
    """What a job that ends by itself printed. One that hangs is killed."""
    try:
        return job.communicate(timeout=HANG)[0]
    finally:
        job.kill()


def wait_for(job: subprocess.Popen[str], what: str, is_there: Callable[[], object]) -> None:
    """Wait for an event of a job that runs. Raises AssertionError with its output when it ends before."""

    def check() -> None:
        assert job.poll() is None, job.communicate()[0][-3000:]

    wait_until(is_there, what, check)


def processes_of(directory: Path) -> dict[int, str]:
    """Living processes with this directory in their command line: {pid: command line}."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in command:
            found[int(entry.name)] = command
    return found


def processes_with(directory: Path, word: str) -> list[int]:
    """Ids of this job's processes with a word in their command line."""
    return sorted(pid for pid, command in processes_of(directory).items() if word in command)


def assert_all_ended(directory: Path) -> None:
    """Nothing of a job is left. Processes that were sent SIGKILL need a moment."""
    wait_until(lambda: not processes_of(directory), f"end of every process: {processes_of(directory)}")


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """Finished steps so far, the start (step 0) included; the last line may be half-written."""
    file = directory / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
