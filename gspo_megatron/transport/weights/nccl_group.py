"""An NCCL group between trainer and servers whose failure is an error and not the end of the process."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore

NO_WATCHDOG = "TORCH_NCCL_BLOCKING_WAIT"


def connect_nccl(store: PrefixStore, device: torch.device, rank: int, world: int, timeout: timedelta) -> Any:
    """A connected NCCL group that leaves this process alive whatever becomes of the other ranks.

    Raises:
        RuntimeError: some did not come within the timeout.
    """
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    # Read when a group is made. Without it the group has a watchdog, which ends the process when a transfer fails or
    # takes too long, whichever error handling is asked for (`Watchdog::runLoop`, `HeartbeatMonitor`).
    before = os.environ.get(NO_WATCHDOG)
    os.environ[NO_WATCHDOG] = "1"
    try:
        group = ProcessGroupNCCL(store, rank, world, options)
    finally:
        os.environ.pop(NO_WATCHDOG) if before is None else os.environ.update({NO_WATCHDOG: before})
    if world > 1:
        # NCCL waits for a rank that never comes without end, and connects only then.
        meet(store, rank, world, timeout)
        # By itself it connects at the first transfer, and waits for ranks that have none.
        group.eager_connect_single_device(device)
    return group


def meet(store: PrefixStore, rank: int, world: int, timeout: timedelta) -> None:
    """Return when every rank has called this. Raises RuntimeError with those that did not."""
    names = [f"met/{other}" for other in range(world)]
    store.set(names[rank], "")
    try:
        store.wait(names, timeout)
    except RuntimeError:
        late = [str(other) for other, name in enumerate(names) if not store.check([name])]
        raise RuntimeError(
            f"not all of the group's {world} ranks joined within {timeout.total_seconds():g} s; "
            f"still absent: {', '.join(late) or 'none, but too late'}"
        ) from None
