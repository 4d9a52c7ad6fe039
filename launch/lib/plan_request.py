"""Asks `launch/lib/plan.py` for the plan of a job, and builds the commands of its roles. Standard library only."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.slurm_steps import Step
from launch.lib.settings import Settings

IN_IMAGE = """\
command -v "$1" >/dev/null && exec "$@"
need="Python and the packages of requirements/base.in"
echo "gspo: the image of GSPO_IMAGE has no $1 on its PATH ($PATH); name one that has $need" >&2
command -p sleep 1 # srun drops what a task writes in its last moment
exit 2
"""
"""Looks for the interpreter of an image; it runs there, so it is text and no file."""


class Refused(Exception):
    """The job must not start; the message is one sentence, or empty when it is printed already."""


@dataclass(frozen=True)
class Plan:
    """What `plan.py` prints."""

    run_dir: Path
    gpus: int
    """GPUs of a node that the run uses; 0 = none."""
    colocated: bool
    """Whether servers and trainer share nodes."""
    steps: dict[str, Step]
    """Nodes and tasks of each kind of role."""
    done: bool
    """Whether the run is finished."""
    attempt: Path
    """Directory of the attempt; of a drawing or a finished run meaningless."""
    number: int
    earlier_jobs: tuple[str, ...]
    """SLURM jobs of older attempts."""

    @classmethod
    def read(cls, printed: dict[str, Any]) -> Plan:
        """From JSON."""
        steps = {kind: Step(kind, tuple(hosts), each) for kind, (hosts, each) in printed["roles"].items()}
        return cls(
            Path(printed["run_dir"]), printed["gpus"], printed["colocated"], steps, printed.get("done", False),
            Path(printed.get("attempt", "")), printed.get("number", 0), tuple(printed.get("earlier_jobs", ())),
        )  # fmt: skip

    @property
    def first_host(self) -> str:
        """The node of the controller and of rank 0."""
        return self.steps["controller"].hosts[0]


def ask_plan(
    phase: str, settings: Settings, job: str, hosts: Sequence[str], gpus: int, arguments: Sequence[str],
    running: Sequence[str] = (),
) -> Plan:  # fmt: skip
    """Plan a job or a drawing. Raises Refused when `plan.py` has refused it."""
    words = ("-m", "launch.lib.plan", phase, "--job", job, "--hosts", ",".join(hosts), "--gpus", str(gpus),
             "--called-in", str(settings.called_in))  # fmt: skip
    command = in_trainer(settings, hosts[0], (*words, *arguments, "--running", *running), phase == "draw")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise Refused("")
    return Plan.read(json.loads(done.stdout.splitlines()[-1]))


def in_trainer(settings: Settings, host: str, words: Sequence[str], drawing: bool = False) -> list[str]:
    """The command that runs Python once, on the first node, in the trainer's environment.

    A drawing, on a login node, is made without the image.

    Raises:
        Refused: the environment has no interpreter.
    """
    if settings.images["trainer"] and not drawing:
        command = ("/bin/sh", "-c", IN_IMAGE, "look", settings.python("trainer"), *words)
        return settings.srun(Step("trainer", (host,)), command)
    python = settings.own_python("trainer")
    if shutil.which(python) is None:
        raise Refused(f"{python} is not there; run make setup, or set GSPO_VENV in the site file")
    return [python, *words]


def role_step(kind: str, plan: Plan, settings: Settings, attempt: Path, log: bool = False) -> list[str]:
    """The srun of a kind of role."""
    command = (settings.python(kind), "-m", "launch.lib.task", str(attempt), kind)
    output = f"{attempt}/{kind}-%N.log" if log else ""
    return settings.srun(plan.steps[kind], command, output)
