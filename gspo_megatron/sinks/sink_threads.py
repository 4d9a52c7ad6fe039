"""The sinks of a run: each in a thread of its own, so that a slow or broken one neither delays nor ends the run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gspo_megatron.config.hooks import load_hook
from gspo_megatron.config.schema import Recipe
from gspo_megatron.config.secret_text import hide_secrets
from gspo_megatron.run_dir import RunDir
from gspo_megatron.sinks.sink_protocol import MetricSink, SinkRun
from gspo_megatron.types import Finding

MakeSink = Callable[[SinkRun], MetricSink]
CLOSE_SECONDS = 60.0
"""Longest wait at the end of a run for sinks to take the rows that are left."""
BUILT_IN = {
    "wandb": "gspo_megatron.sinks.wandb_sink:WandbSink",
    "mlflow": "gspo_megatron.sinks.mlflow_sink:MlflowSink",
    "trackio": "gspo_megatron.sinks.trackio_sink:TrackioSink",
}


def open_sinks(recipe: Recipe, run_dir: Path, run_id: str) -> Sinks:
    """Start the sinks of a recipe. Rank 0 does so once per attempt.

    Args:
        recipe: names the sinks.
        run_dir: the run directory.
        run_id: the same for every attempt.

    Raises:
        RecipeError: an object that is no sink.
    """
    section, threads = recipe.metrics, []
    for name in section.sinks:
        short = name if name in BUILT_IN else name.rpartition(":")[2]
        if any(thread.name == short for thread in threads):
            short = f"{short}-{len(threads)}"
        directory = RunDir(run_dir).sinks / short
        directory.mkdir(parents=True, exist_ok=True)
        values = recipe.model_dump(mode="json")
        run = SinkRun(run_id, recipe.run.name, section.project, directory, section.online, values)
        threads.append(SinkThread(short, load_sink(name), run))
    return Sinks(threads)


def load_sink(name: str) -> MakeSink:
    """Return what makes a sink: a row of `BUILT_IN`, or a user's object that keeps the contract. Raises RecipeError."""
    return load_hook("sink", BUILT_IN.get(name, name))


class SinkThread:
    """One sink and the thread that it lives in."""

    def __init__(self, name: str, make: MakeSink, run: SinkRun) -> None:
        self.name = name
        self.failures = 0
        """Rows that it did not take."""
        self.fault = ""
        """The first error, without secrets."""
        self._make, self._run = make, run
        self._rows: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"sink {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Hand over a row."""
        self._rows.put((step, dict(row)))

    def close(self) -> None:
        """Hand over the end."""
        self._rows.put(None)

    def wait(self, seconds: float) -> bool:
        """Whether the sink has finished within this time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Rows that it was handed and has not taken yet."""
        return self._rows.qsize()

    def _work(self) -> None:
        # Some libraries leave by SystemExit when they are not logged in.
        sink = None
        try:
            sink = self._make(self._run)
        except (Exception, SystemExit) as error:
            self._note(error)
        while (item := self._rows.get()) is not None:
            if sink is None:
                self.failures += 1
                continue
            try:
                sink.write(*item)
            except (Exception, SystemExit) as error:
                self.failures += 1
                self._note(error)
        if sink is not None:
            try:
                sink.close()
            except (Exception, SystemExit) as error:
                self._note(error)

    def _note(self, error: BaseException) -> None:
        words = " ".join(hide_secrets(str(error)).split())[:300]
        self.fault = self.fault or f"{type(error).__name__}: {words}"


class Sinks:
    """All sinks of a run."""

    def __init__(self, threads: list[SinkThread]) -> None:
        self._threads = threads
        self._warned: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._threads)

    @property
    def failures(self) -> int:
        """Rows that a sink did not take, so far."""
        return sum(thread.failures for thread in self._threads)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Hand a row to every sink."""
        for thread in self._threads:
            thread.write(step, row)

    def warnings(self) -> Iterator[Finding]:
        """A warning for each sink that has failed, once."""
        for thread in self._threads:
            if thread.fault and thread.name not in self._warned:
                self._warned.add(thread.name)
                yield Finding(
                    "metric-sink-failed", "warning", "metrics.sinks", f"{thread.name} failed: {thread.fault}",
                    "the run goes on and counts its lost rows as sink_failures; metrics.jsonl has them all",
                )  # fmt: skip

    def close(self, seconds: float = CLOSE_SECONDS) -> Iterator[Finding]:
        """End all sinks, and yield what is left to say."""
        for thread in self._threads:
            thread.close()
        for thread in self._threads:
            if not thread.wait(seconds):
                yield Finding(
                    "metric-sink-slow", "warning", "metrics.sinks",
                    f"{thread.name} did not finish within {seconds:g} s; {thread.waiting} messages wait",
                    "metrics.jsonl has every row",
                )  # fmt: skip
        yield from self.warnings()
