"""When a run saves a checkpoint and stops before its last step: after a signal, or before its time limit."""

from __future__ import annotations

import os
import time

from gspo_megatron.cluster.stop_signals import StopSignals
from gspo_megatron.trainer.step import Trainer

END_TIME = "SLURM_JOB_END_TIME"
"""Environment variable: end of the job, seconds since 1970; SLURM sets it in every batch job with a time limit."""
MARGIN = 30.0
"""Seconds that the processes need to end."""
FIRST_SAVE = 120.0
"""Seconds assumed for a save before one was measured."""


class StopRequest:
    """A request to save after the current step and to stop: by a signal, or by the time limit of the job."""

    def __init__(self) -> None:
        self._slowest = 0.0
        self._began = time.monotonic()
        self._end = float(os.environ.get(END_TIME, "inf"))
        self._signals = StopSignals()

    def is_raised(self, trainer: Trainer, save_seconds: float) -> bool:
        """Whether to stop after this step. Rank 0 decides for every rank: a signal reaches them at different moments.

        Args:
            trainer: of this rank.
            save_seconds: seconds of the last save; 0 = no save yet.
        """
        now = time.monotonic()
        self._slowest, self._began = max(self._slowest, now - self._began), now
        # The next step and a save after it must fit; both vary, so a save counts twice.
        needed = self._slowest + 2 * (save_seconds or FIRST_SAVE) + MARGIN
        # A stage of its own, like the saves, so that the watchdog also sees a rank that hangs between two steps.
        with trainer.log.time("stop"):
            return trainer.on_first_rank(lambda controller: self._signals.raised or time.time() + needed > self._end)
