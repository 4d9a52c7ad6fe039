"""When a run saves itself and stops before its last step: asked by a signal, or before its time is over."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from gspo_megatron.trainer.step import Trainer

END_TIME = "SLURM_JOB_END_TIME"
"""Environment: when the job is ended, seconds since 1970; SLURM sets it in every batch job with a time limit."""
MARGIN = 30.0
"""Seconds kept for the end of the processes."""
FIRST_SAVE = 120.0
"""Seconds that a save is taken to need before one was measured."""


class StopRequest:
    """SIGUSR1 asks the trainer to save after the step that it is in, and to stop; so does the end of its time."""

    def __init__(self) -> None:
        self._raised = False
        self._slowest = 0.0
        self._began = time.monotonic()
        self._end = float(os.environ.get(END_TIME, "inf"))
        signal.signal(signal.SIGUSR1, self._raise)
        # Whoever started this process had it hold the signal back until somebody listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._raised = True

    def is_raised(self, trainer: Trainer, save_seconds: float) -> bool:
        """Whether to stop after this step, on every rank: rank 0 decides, a signal reaches them at different moments.

        Args:
            trainer: whose ranks agree.
            save_seconds: what the last save took; 0 = none was made.
        """
        now = time.monotonic()
        self._slowest, self._began = max(self._slowest, now - self._began), now
        # The next step and a save after it must fit; both vary, so a save counts twice.
        needed = self._slowest + 2 * (save_seconds or FIRST_SAVE) + MARGIN
        # A stage of its own, like the saves: a rank that hangs between two steps is missed as soon as within one.
        with trainer.log.time("stop"):
            return trainer.on_first_rank(lambda controller: self._raised or time.time() + needed > self._end)
