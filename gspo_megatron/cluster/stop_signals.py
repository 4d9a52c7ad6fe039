"""The signals that ask a trainer to save and stop: USR1, and on SLURM also TERM, which announces a preemption.

What starts a role holds them back (`hold_back`); a trainer takes them once it can act on them (`StopSignals`). Servers
and the controller never take them: a trainer that finishes its step during SLURM's grace time needs them to live.
"""

from __future__ import annotations

import signal
from types import FrameType


def hold_back() -> None:
    """Block the signals for this process and all that it starts, until a `StopSignals` exists."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})


class StopSignals:
    """Whether one of them has come. SIGTERM is one only if it was held back; on one machine it ends a process."""

    def __init__(self) -> None:
        self.raised = False
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM}
        for number in {signal.SIGUSR1} | held:
            signal.signal(number, self._raise)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, *held})

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
