"""Checkpoints of a run: copied while training waits, written while it continues, marked, then renamed.

    checkpoints/step_000012/    rank_00000.safetensors ...   weights and optimizer (policy/snapshot.py)
                                state.json                   counters, controller, layout, objective, file sizes
                                recipe.resolved.yaml         the recipe that was running
                                COMPLETE                     written last

A half-written one has another name, so it is never loaded. An attempt that a newer one has replaced (a node that was
cut off and comes back) publishes nothing: the run directory's `attempt` file names the newest attempt.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from gspo_megatron.cluster.attempts import find_checkpoint, refuse_if_replaced
from gspo_megatron.parallel import Layout
from gspo_megatron.policy.restore import SavedPolicy, restore
from gspo_megatron.policy.snapshot import SAVE, Snapshot, optimizer_steps, rank_file
from gspo_megatron.run_dir import CHECKPOINT, CheckpointDir, RunDir, complete_checkpoints, is_partial, partial_name
from gspo_megatron.run_log import RunLog
from gspo_megatron.trainer.step import Trainer
from gspo_megatron.transport.messages import ControllerState

POLL_SECONDS = 0.02


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written; one sentence."""


class CheckpointWriter:
    """Saves of one trainer rank. Every rank calls every method, in the same order."""

    def __init__(self, directory: Path, kept: int, log: RunLog) -> None:
        """
        Args:
            directory: `checkpoints` of the run directory.
            kept: number of complete checkpoints that stay.
            log: of this rank; its pulse shows progress while the ranks wait together for a slow disk.
        """
        self.directory, self.kept, self._log = directory, kept, log
        self.seconds = 0.0
        """Seconds of the last save from its start to its marker, on rank 0."""
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
        start = time.monotonic()
        # Before anything is copied: the data position belongs to the end of this step.
        controller, token = trainer.on_first_rank(lambda controller: (controller.state(), secrets.token_hex(4)))
        partial = self.directory / partial_name(step, token)
        partial.mkdir(parents=True, exist_ok=True)
        self._snapshot.take(trainer.policy)
        state = {
            "step": step,
            SAVE: token,
            "version": trainer.version,
            "updates": trainer.updates,
            "skipped": trainer.skipped,
            "optimizer_steps": optimizer_steps(trainer.policy),
            "objective": trainer.objective_sentence(),
            "controller": controller.model_dump(mode="json", by_alias=True),
            "layout": asdict(trainer.policy.layout),
        }
        self._thread = threading.Thread(target=self._write, args=(partial, state, start, dist.get_rank()), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check, without waiting, whether the running save has failed on any rank.

        Raises:
            CheckpointError: it has failed.
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
        """Wait until the running save is published.

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

    def _write(self, partial: Path, state: dict[str, Any], start: float, rank: int) -> None:
        """The background part of a save: this rank's file, and on rank 0 the publication."""
        file = rank_file(partial, rank)
        unfinished = file.with_suffix(".unfinished")
        try:
            self._snapshot.write(unfinished, state[SAVE])
            unfinished.rename(file)
            if rank == 0 and self._all_written(partial):
                self._publish(partial, state)
                self.seconds = time.monotonic() - start
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


def find_latest(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that can be resumed from; every rank gets the same. Newer ones are skipped by name.

    Raises:
        CheckpointError: there are complete checkpoints, and none can be read.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [find_checkpoint(directory, _inspect)]
    dist.broadcast_object_list(found, src=0)
    newest, faults = found[0]
    listed = "; ".join(f"{path.name}: {fault}" for path, fault in faults.items())
    if newest is None and faults:
        raise CheckpointError(
            f"no checkpoint in {directory} can be read ({listed}); put their files back, or move them to start anew"
        )
    if faults:
        say(f"skipped: {listed}")
    return newest


def _inspect(checkpoint: Path) -> str | None:
    """Why the state or the header of a file cannot be read, or None."""
    try:
        state = json.loads(CheckpointDir(checkpoint).state.read_text())
        ControllerState.from_json(json.dumps(state["controller"]))
        Layout(**state["layout"])
    except (ValueError, TypeError) as error:
        return f"state.json is damaged ({' '.join(str(error).split())[:200]})"
    for name in state["files"]:
        try:
            with safe_open(checkpoint / name, "pt") as file:
                # Sizes agree where the files of two checkpoints of one run are mixed. Earlier versions have no token.
                if SAVE in state and (file.metadata() or {}).get(SAVE) != state[SAVE]:
                    return f"{name} is of another checkpoint"
        except (OSError, SafetensorError) as error:
            return f"{name} is damaged ({error})"
    return None


def load(trainer: Trainer, checkpoint: Path) -> int:
    """Resume from a checkpoint of any layout. Every rank calls it; the servers need a `sync` afterwards.

    Returns:
        Steps done.
    """
    state: dict[str, Any] = json.loads(CheckpointDir(checkpoint).state.read_text())
    saved = SavedPolicy(checkpoint, trainer.policy.weights.arch, Layout(**state["layout"]))
    restore(trainer.policy, saved, state["optimizer_steps"])
    # `sync` adds one: the first version that the servers get is the one that they had.
    trainer.version, trainer.updates, trainer.skipped = state["version"] - 1, state["updates"], state["skipped"]
    trainer.wait_for_servers()
    saved_state = ControllerState.from_json(json.dumps(state["controller"]))
    trainer.on_first_rank(lambda controller: controller.restore(saved_state))
    trainer.log.rewind(state["step"])
    trainer.log.say(f"goes on after step {state['step']} ({checkpoint})")
    if state["objective"] != trainer.objective_sentence():
        trainer.log.say(f"with another objective; until now it was: {state['objective']}")
    return state["step"]


def _sync(path: Path) -> None:
    """Wait until a file or the names in a directory are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
