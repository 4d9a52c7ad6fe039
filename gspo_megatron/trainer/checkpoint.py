"""Checkpoints of a run: copied while training stands still, written while it goes on, marked, then renamed.

    checkpoints/step_000012/    rank_00000.safetensors ...   weights and optimizer (policy/checkpoint.py)
                                state.json                   counters, controller, layout, objective, file sizes
                                recipe.resolved.yaml         the recipe that was running
                                COMPLETE                     written last

A half-written one has another name, so it is never picked up. An attempt that another one has replaced (a node that
was cut off and comes back) may not publish any more: the run directory's `attempt` file names the newest.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gspo_megatron.cluster.attempts import refuse_if_replaced
from gspo_megatron.parallel import Layout
from gspo_megatron.policy.restore import SavedPolicy, restore
from gspo_megatron.policy.snapshot import Snapshot, optimizer_steps, rank_file
from gspo_megatron.run_dir import CHECKPOINT, CheckpointDir, RunDir, complete_checkpoints, is_partial, partial_name
from gspo_megatron.run_log import RunLog
from gspo_megatron.trainer.step import Trainer

POLL_SECONDS = 0.02


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written; one sentence."""


class CheckpointWriter:
    """Saves of one trainer rank. Every rank calls every method, in the same order."""

    def __init__(self, directory: Path, kept: int, log: RunLog) -> None:
        """
        Args:
            directory: `checkpoints` of the run directory.
            kept: how many complete ones stay.
            log: of this rank; hears that the run gets on while the ranks wait together for a slow disk.
        """
        self.directory, self.kept, self._log = directory, kept, log
        self.seconds = 0.0
        """How long the last save took from its start to its marker, as rank 0 saw it."""
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._fault: str | None = None
        self._abandoned = threading.Event()

    def save(self, trainer: Trainer, step: int) -> None:
        """Copy the state at the end of a step; the files are written while the next steps run.

        Raises:
            CheckpointError: the save before this one failed, on any rank.
        """
        with self._log.time("checkpoint"):
            self._save(trainer, step)

    def _save(self, trainer: Trainer, step: int) -> None:
        self.wait()
        began = time.monotonic()
        # Before anything is copied: the data position belongs to the end of this step.
        controller, token = trainer.on_first_rank(lambda controller: (controller.state(), secrets.token_hex(4)))
        partial = self.directory / partial_name(step, token)
        partial.mkdir(parents=True, exist_ok=True)
        self._snapshot.take(trainer.policy)
        state = {
            "step": step,
            "version": trainer.version,
            "updates": trainer.updates,
            "skipped": trainer.skipped,
            "optimizer_steps": optimizer_steps(trainer.policy),
            "objective": trainer.objective_sentence(),
            "controller": controller,
            "layout": asdict(trainer.policy.layout),
        }
        self._thread = threading.Thread(target=self._write, args=(partial, state, began, dist.get_rank()), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Tell, without waiting, whether the save under way has failed on any rank.

        Raises:
            CheckpointError: it has.
        """
        with self._log.time("check"):
            busy, failed = self._agree()
        if failed:
            self._abandoned.set()
            faults: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(faults, self._fault)
            rank, fault = next((rank, fault) for rank, fault in enumerate(faults) if fault)
            raise CheckpointError(f"trainer rank {rank} could not save: {fault}")
        if not busy:
            self._thread = None

    def wait(self) -> None:
        """Wait until the save under way is published.

        Raises:
            CheckpointError: it failed on some rank.
        """
        while self._agree()[0]:
            self._log.pulse.beat()
            if self._thread is not None:
                self._thread.join(POLL_SECONDS)
            self.check()
        self.check()

    def _agree(self) -> tuple[bool, bool]:
        """Whether any rank is still writing, and whether any has failed."""
        alive = self._thread is not None and self._thread.is_alive()
        flags = torch.tensor([alive, self._fault is not None], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags[0]), bool(flags[1])

    def _write(self, partial: Path, state: dict[str, Any], began: float, rank: int) -> None:
        """The background part of a save: this rank's file, and on rank 0 the publication."""
        file = rank_file(partial, rank)
        unfinished = file.with_suffix(".unfinished")
        try:
            self._snapshot.write(unfinished)
            unfinished.rename(file)
            if rank == 0 and self._all_written(partial):
                self._publish(partial, state)
                self.seconds = time.monotonic() - began
        except (OSError, ValueError) as error:
            self._fault = str(error)
            unfinished.unlink(missing_ok=True)

    def _all_written(self, partial: Path) -> bool:
        """Wait for every rank's file; False when the save was abandoned."""
        waiting = [rank_file(partial, rank) for rank in range(dist.get_world_size())]
        while waiting and not self._abandoned.wait(POLL_SECONDS):
            waiting = [file for file in waiting if not file.is_file()]
        return not waiting

    def _publish(self, partial: Path, state: dict[str, Any]) -> None:
        final, written = self.directory / CHECKPOINT.name(state["step"]), CheckpointDir(partial)
        files = sorted(partial.glob("rank_*"))
        sizes = {file.name: file.stat().st_size for file in files}
        written.state.write_text(json.dumps({**state, "files": sizes}, indent=1))
        recipe = RunDir(self.directory.parent).recipe
        if recipe.is_file():
            shutil.copyfile(recipe, written.recipe)
        _sync(written.state)
        refuse_if_replaced(self.directory.parent)
        written.marker.touch()
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(self.directory)
        abandoned = [path for path in self.directory.iterdir() if is_partial(path.name)]
        for old in [*complete_checkpoints(self.directory)[: -self.kept], *abandoned]:
            shutil.rmtree(old, ignore_errors=True)


def find_latest(directory: Path) -> Path | None:
    """The newest complete checkpoint whose files have the sizes that were written; every rank hears the same."""
    found: list[Path | None] = [None]
    if dist.get_rank() == 0:
        found = [next((path for path in reversed(complete_checkpoints(directory)) if is_whole(path)), None)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def load(trainer: Trainer, checkpoint: Path) -> int:
    """Go on from a checkpoint of any layout. Every rank calls it; the servers need a `sync` afterwards.

    Returns:
        Steps done.
    """
    state: dict[str, Any] = json.loads(CheckpointDir(checkpoint).state.read_text())
    saved = SavedPolicy(checkpoint, trainer.policy.weights.arch, Layout(**state["layout"]))
    restore(trainer.policy, saved, state["optimizer_steps"])
    # `sync` counts on: the version that the servers get first is the one they had.
    trainer.version, trainer.updates, trainer.skipped = state["version"] - 1, state["updates"], state["skipped"]
    trainer.wait_for_servers()
    trainer.on_first_rank(lambda controller: controller.restore(state["controller"]))
    trainer.log.rewind(state["step"])
    trainer.log.say(f"goes on after step {state['step']} ({checkpoint})")
    if state["objective"] != trainer.objective_sentence():
        trainer.log.say(f"with another objective; until now it was: {state['objective']}")
    return state["step"]


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of a complete checkpoint still has the size that was written."""
    sizes: dict[str, int] = json.loads(CheckpointDir(checkpoint).state.read_text()).get("files", {})
    files = {checkpoint / name: size for name, size in sizes.items()}
    return bool(files) and all(file.is_file() and file.stat().st_size == size for file, size in files.items())


def _sync(path: Path) -> None:
    """Wait until a file or the names in a directory are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
