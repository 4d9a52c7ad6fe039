"""The preflight: one short step on every node before a role starts. Standard library only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gspo_megatron.cluster.slurm_steps import Step
from gspo_megatron.cluster.slurm_words import CREATE_SECONDS, CREATE_TRIES, NOT_CREATED, reasons
from gspo_megatron.run_dir import AttemptDir
from launch.lib.plan_request import Plan, Refused, in_trainer
from launch.lib.settings import Settings

LOOK_SECONDS = 0.2
LOOK = """\
fail() { echo "$SLURMD_NODENAME: $*" >&2; sleep 1; exit 2; } # srun drops what a task writes in its last moment
for limit in f n t v; do ulimit -S "-$limit" "$(ulimit -H "-$limit")"; done
cd "$1" 2>/dev/null || fail "$1 is not there; put the checkout on a file system that all nodes share"
command -v "$2" >/dev/null || fail "$2 is not there; run make setup, or set GSPO_VENV or GSPO_IMAGE in the site file"
[ -d "$3" ] || fail "$3 is not there; mount it, or give another run.directory"
exec "$2" -m launch.lib.probe "$3" "$4"
"""
"""What must be there before any Python can report a fault; it runs on the node, so it is text and no file."""


SICK = 3
"""Exit code of the judgement when hardware of some nodes is the only fault."""


class SickNodes(Refused):
    """The hardware of some nodes must not be used; on others the job may run."""


def check_nodes(plan: Plan, settings: Settings, attempt: Path) -> None:
    """Probe every node, hold the reports against each other, and let the trainer nodes all-reduce.

    Raises:
        Refused: a sentence for each fault is printed.
    """
    kinds = ["trainer"]
    # Two environments on one node are both probed; one is probed once.
    trainer, rollout = ((settings.python(kind), settings.container(kind)) for kind in ("trainer", "rollout"))
    if not plan.colocated or trainer != rollout:
        kinds.append("rollout")
    steps = [Step(kind, plan.steps[kind].hosts) for kind in kinds]
    environment = {**os.environ, "GSPO_PROBES": str(sum(step.tasks for step in steps))}
    texts = [AttemptDir(attempt).preflight / f"{kind}.txt" for kind in kinds]
    commands = [
        ("bash", "-c", LOOK, "look", str(settings.home), settings.python(kind), str(attempt), kind) for kind in kinds
    ]
    lines = [settings.srun(step, command) for step, command in zip(steps, commands)]
    tries = CREATE_TRIES
    while not (passed := _run_together(lines, texts, environment)) and tries and _not_created(texts):
        tries -= 1
        time.sleep(CREATE_SECONDS)
    if not passed:
        said = [line for text in texts for line in text.read_text(errors="replace").splitlines()]
        print("\n".join(reasons(said)), file=sys.stderr, flush=True)
        raise Refused("")
    judge = in_trainer(settings, plan.first_host, ("-m", "launch.lib.plan", "judge", str(attempt)))
    code = subprocess.run(judge, stdin=subprocess.DEVNULL).returncode
    if code:
        raise SickNodes("") if code == SICK else Refused("")
    if plan.gpus:
        _reduce_over_network(plan, settings, attempt)


def _run_together(lines: Sequence[Sequence[str]], texts: Sequence[Path], environment: dict[str, str]) -> bool:
    """Run a step of each line, whose words go to its file."""
    running: list[subprocess.Popen[bytes]] = []
    for line, text in zip(lines, texts):
        with text.open("wb") as log:
            running.append(subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
    return _all_end_well(running)


def _not_created(texts: Sequence[Path]) -> bool:
    """Whether SLURM has not started a step at all."""
    return any(NOT_CREATED.search(text.read_text(errors="replace")) for text in texts)


def _all_end_well(running: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Wait for the probes. They wait for each other: once one has failed, the rest is ended."""
    failed = False
    while True:
        time.sleep(LOOK_SECONDS)
        codes = [process.poll() for process in running]
        failed = failed or any(codes)
        if None not in codes:
            return not failed
        if failed:
            for process in running:
                process.terminate()


def _reduce_over_network(plan: Plan, settings: Settings, attempt: Path) -> None:
    """A small all-reduce over all trainer nodes, one GPU of each."""
    step = Step("trainer", plan.steps["trainer"].hosts)
    command = (settings.python("trainer"), "tools/check_network.py", str(AttemptDir(attempt).plan))
    done = subprocess.run(settings.srun(step, command), stdin=subprocess.DEVNULL)
    if done.returncode:
        raise Refused("the trainer nodes cannot all-reduce over their network (see above)")
