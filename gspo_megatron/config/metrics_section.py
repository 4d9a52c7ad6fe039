"""The section `metrics`: where the numbers of a run go beside metrics.jsonl and TensorBoard."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

from gspo_megatron.config.base import Section
from gspo_megatron.config.hooks import check_choice
from gspo_megatron.config.recipe_paths import ObjectReference

SINK_PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "wandb": (("wandb",), "wandb"),
    "mlflow": (("mlflow", "sqlalchemy", "alembic"), "mlflow-skinny sqlalchemy alembic"),
    "trackio": (("trackio",), "trackio"),
}
"""Sink -> modules that it imports, and the packages that hold them. None is installed by `make setup`."""


class MetricsSection(Section):
    """`metrics`: metric sinks, beside metrics.jsonl and TensorBoard. A sink that fails is a warning."""

    sinks: tuple[ObjectReference, ...] = ()
    """`wandb`, `mlflow`, `trackio`, or `file.py:NAME` (a MetricSink, see sinks/README.md). Several are allowed."""
    project: str = "gspo"
    """Project of Weights & Biases and trackio, experiment of MLflow. Source: chosen here."""
    online: bool = False
    """false: the sinks write below the run directory, without network. true: wandb and trackio send to their servers,
    mlflow to MLFLOW_TRACKING_URI. Keys come from the libraries' own variables, e.g. WANDB_API_KEY."""

    @field_validator("sinks", mode="before")
    @classmethod
    def one_sink_may_stand_alone(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("sinks")
    @classmethod
    def sinks_are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            check_choice(name, tuple(SINK_PACKAGES))
        if len(set(value)) < len(value):
            raise ValueError(f"sinks={list(value)} names one twice; name each once")
        return value
