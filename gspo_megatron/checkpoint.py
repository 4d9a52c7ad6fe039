"""Checkpoints of a run: written beside, marked complete, then renamed, so that a half-written one is never picked up.

    checkpoints/step_000012/    rank_00000.pt ...   weights and optimizer of each rank
                                state.json          counters, data position, layout
                                COMPLETE            written last

An attempt that another one has replaced (a node that was cut off and comes back) may not publish any more: the run
directory's `attempt` file names the newest.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from gspo_megatron.policy.checkpoint import policy_state, restore_policy
from gspo_megatron.trainer import Trainer

STOPPED = 85
"""Exit code of a trainer that saved and stopped because it was asked to: the job is to be queued again."""
MARKER = "COMPLETE"
STATE = "state.json"
FENCE = "attempt"
"""File of the run directory: number of its newest attempt, then the job."""
KEPT = 2
"""Complete checkpoints that stay: the newest, and the one before in case the newest is damaged later."""


class StopRequest:
    """SIGUSR1 asks the trainer to save after the step that it is in, and to stop."""

    def __init__(self) -> None:
        self._raised = False
        signal.signal(signal.SIGUSR1, self._raise)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._raised = True

    def is_raised(self, trainer: Trainer) -> bool:
        """Whether rank 0 was asked, on every rank; the signal reaches them at different moments."""
        return trainer.on_first_rank(lambda link: self._raised)


def save(trainer: Trainer, directory: Path, step: int) -> None:
    """Write a checkpoint after a whole step. Every rank calls it.

    Args:
        directory: `checkpoints` of the run directory.
        step: steps done.
    """
    final = directory / f"step_{step:06d}"
    partial = directory / f".{final.name}.partial"
    first = dist.get_rank() == 0
    # Before anything is written: the data position belongs to the end of this step.
    controller = trainer.on_first_rank(lambda link: link.state())
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with _rank_file(partial).open("wb") as file:
        torch.save(policy_state(trainer.policy), file)
        file.flush()
        os.fsync(file.fileno())
    dist.barrier()
    if first:
        state = {
            "step": step,
            "version": trainer.version,
            "updates": trainer.updates,
            "skipped": trainer.skipped,
            "objective": trainer.objective_sentence(),
            "controller": controller,
            "layout": asdict(trainer.policy.layout),
        }
        (partial / STATE).write_text(json.dumps(state, indent=1))
        (partial / MARKER).touch()
        refuse_if_replaced(directory.parent)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in complete(directory)[:-KEPT]:
            shutil.rmtree(old)
    dist.barrier()


def load_latest(trainer: Trainer, directory: Path) -> int | None:
    """Go on from the newest complete checkpoint. Every rank calls it; the servers need a `sync` afterwards.

    Returns:
        Steps done, or None when there is no checkpoint and nothing was changed.

    Raises:
        ValueError: it was written with another model or layout.
    """
    found = [(complete(directory) or [None])[-1] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    newest = found[0]
    if newest is None:
        return None
    state: dict[str, Any] = json.loads((newest / STATE).read_text())
    layout = asdict(trainer.policy.layout)
    for name, value in state["layout"].items():
        if layout[name] != value:
            raise ValueError(
                f"checkpoint {newest} was written with layout {name}={value}, this run has {layout[name]}; "
                "go on with the layout that it was written with"
            )
    trainer.start_reinforcement()
    restore_policy(trainer.policy, torch.load(_rank_file(newest), weights_only=True, map_location="cpu"))
    # `sync` counts on: the version that the servers get first is the one they had.
    trainer.version, trainer.updates, trainer.skipped = state["version"] - 1, state["updates"], state["skipped"]
    trainer.wait_for_servers()
    trainer.on_first_rank(lambda link: link.restore(state["controller"]))
    trainer.log.rewind(state["step"])
    trainer.log.say(f"goes on after step {state['step']} ({newest})")
    return state["step"]


def complete(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step_*") if (path / MARKER).is_file())


def refuse_if_replaced(run_dir: Path) -> None:
    """Raise ValueError if this attempt is not the run's newest; without attempts (one machine) nothing is checked."""
    mine, fence = os.environ.get("GSPO_ATTEMPT"), run_dir / FENCE
    if mine is None or not fence.is_file():
        return
    newest = fence.read_text().split()[0]
    if int(newest) > int(mine):
        raise ValueError(
            f"attempt {mine} was replaced by attempt {newest} of {run_dir}; its checkpoint is not published"
        )


def _rank_file(directory: Path) -> Path:
    return directory / f"rank_{dist.get_rank():05d}.pt"
