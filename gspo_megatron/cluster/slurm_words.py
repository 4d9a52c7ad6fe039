"""What SLURM writes about a step: which task ended, and how. Runs on the batch node, with the standard library only."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SLURM_WORDS = re.compile("srun|slurmstepd")
"""What lines of SLURM itself begin with."""
CONSEQUENCES = re.compile(
    r"(srun|slurmstepd)\S*: (launch/slurm: |error: (\S+: tasks? |\*\*\*)|Terminating|Job step aborted|[Ff]orc|"
    r"interrupt|First task|cluster configuration lacks support for cpu binding)"
)
"""Lines of SLURM that say that tasks have ended, or of an option of ours that it changes nothing: no reasons."""
NOT_CREATED = re.compile(r"^srun: error: Unable to create step for job ", re.MULTILINE)
"""A step that SLURM has not started, which a slurmctld that was just started says of any."""
CREATE_TRIES = 10
CREATE_SECONDS = 2.0
"""How often such a step is asked for again, and after how long."""
FIRST_END = re.compile(r"error: [^ ]+: tasks? |Node failure on")
TASK_END = re.compile(r"error: ([^ ]+): tasks? (\d*)[^:]*: (.*)")
NODE_LOST = re.compile(r"Node failure on ([^ ]+)")
KILLED = re.compile(r"Killed|Aborted|fault|error$")
OWN_WORDS = re.compile(r"^[0-9: ]*$|^ *([0-9]+: )?(slurmstepd|srun)")
"""Lines of a log that are not the role's: empty, or SLURM's."""


@dataclass(frozen=True)
class StepEnd:
    """How a step ended."""

    node: str
    """Of the task that ended first; empty = SLURM names none."""
    task: str
    """Its number; empty = SLURM names none."""
    reason: str

    def reason_by(self, log: Sequence[str]) -> str:
        """The reason; what the role wrote says more than its exit code, a killed one wrote nothing about it."""
        own = [line for line in log if not OWN_WORDS.search(line)]
        # The others write too when they lose it, and a node has one log.
        own = [line for line in own if self.task and re.match(rf" *{self.task}: ", line)] or own
        return re.sub(r"^ *[0-9]*: ", "", own[-1]) if self.reason.startswith("Exited") and own else self.reason


def read_end(words: Sequence[str], code: int) -> StepEnd:
    """How a step ended.

    Args:
        words: lines that srun has written.
        code: that srun ended with.
    """
    said = reasons(words)
    last = first_end(words) or (said[-1] if said else "")
    if task := TASK_END.search(last):
        return StepEnd(task[1], task[2], task[3])
    if lost := NODE_LOST.search(last):
        return StepEnd(lost[1], "", "the node is lost")
    how = f"srun ended with {code}" if code >= 0 else f"its srun was killed by {signal.Signals(-code).name}"
    return StepEnd("", "", f"{last} ({how})" if last else how)


def first_end(words: Iterable[str]) -> str:
    """What srun wrote about its first task that ended badly."""
    return next((line for line in words if FIRST_END.search(line)), "")


def reasons(lines: Iterable[str]) -> list[str]:
    """What a step and SLURM have said, without SLURM's lines that only follow from it; all where nothing is left."""
    lines = list(lines)
    return [line for line in lines if line.strip() and not CONSEQUENCES.match(line)] or lines
