"""MLflow. Without network the store is RUN_DIR/sinks/mlflow/mlflow.db: `mlflow server --backend-store-uri sqlite:///...`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from gspo_megatron.sinks.sink_protocol import SinkRun

TAG = "gspo_run_id"
MOST_METRICS = 1000
"""Metrics of one request, by MLflow's limit."""
MOST_PARAMETERS = 100
LONGEST_PARAMETER = 500


class MlflowSink:
    """One MLflow run over all attempts, found by its tag. Of a step that is done again both values stay."""

    def __init__(self, run: SinkRun) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        here = None if run.online else f"sqlite:///{run.directory / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=here)
        found = self._client.get_experiment_by_name(run.project)
        place = None if run.online else (run.directory / "artifacts").as_uri()
        number = found.experiment_id if found else self._client.create_experiment(run.project, place)
        earlier = self._client.search_runs([number], f"tags.{TAG} = '{run.id}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(number, tags={TAG: run.id}, run_name=run.name).info.run_id
        values = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in _flatten(run.recipe)]
        for first in range(0, len(values), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=values[first : first + MOST_PARAMETERS])

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Log a row at its step."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in row.items()]
        for first in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + MOST_METRICS])

    def close(self) -> None:
        """Mark the run as finished; a later attempt opens it again."""
        self._client.set_terminated(self._id)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
