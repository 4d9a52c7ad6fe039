"""The cases of a module in lanes: most of a job's time is waiting for SLURM, so several jobs run at once."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from tests.slurm.jobs import Workplace
from tests.slurm.lab.cluster import wait_for
from tests.slurm.leftovers import GONE, find_leftovers

LANES = 3
"""Jobs at a time: each takes some CPU seconds to start."""
Scenario = Callable[[Workplace], None]


def clear(lane: Workplace) -> None:
    """Cancel its jobs until nothing is left: SLURM forgets a scancel of a job that is just being queued again."""

    def is_clear() -> bool:
        lane.cancel_all()
        return not find_leftovers(lane)

    wait_for(is_clear, GONE, "end of what jobs have left", pause=2.0)


class Scenarios:
    """Functions that each submit jobs of their own, and disturb no others."""

    def __init__(self) -> None:
        self.functions: dict[str, Scenario] = {}

    def add(self, scenario: Scenario) -> Scenario:
        """Decorator of one."""
        self.functions[scenario.__name__] = scenario
        return scenario

    def run(self, place: Workplace) -> dict[str, Future[None]]:
        """All of them at their end, good or bad; nothing of any is left."""
        ends: dict[str, Future[None]] = {name: Future() for name in self.functions}
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in self.functions:
            waiting.put(name)

        def run_lane() -> None:
            while not waiting.empty():
                name = waiting.get()
                lane = place.share()
                try:
                    self.functions[name](lane)
                    clear(lane)
                except BaseException as error:
                    for job in lane.jobs:
                        error.add_note(job.everything())
                    lane.cancel_all()
                    ends[name].set_exception(error)
                else:
                    ends[name].set_result(None)

        with ThreadPoolExecutor(LANES) as pool:
            lanes = [pool.submit(run_lane) for _ in range(LANES)]
        for lane in lanes:
            lane.result()
        return ends
