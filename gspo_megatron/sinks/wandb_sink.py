"""Weights & Biases. Offline runs are sent later by `wandb sync RUN_DIR/sinks/wandb/wandb/offline-run-*`."""

from __future__ import annotations

from collections.abc import Mapping

from gspo_megatron.sinks.sink_protocol import SinkRun


class WandbSink:
    """One W&B run over all attempts. Of a step that is done again W&B keeps the first row."""

    def __init__(self, run: SinkRun) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        # Nothing of the process goes with the numbers: no terminal output, code, command line or machine.
        settings = wandb.Settings(
            console="off", disable_git=True, disable_code=True, save_code=False, silent=True, x_disable_stats=True,
            x_disable_meta=True,
        )  # fmt: skip
        self._run = wandb.init(
            project=run.project, id=run.id, name=run.name, dir=str(run.directory), config=run.recipe,
            mode="online" if run.online else "offline", resume="allow", settings=settings,
        )  # fmt: skip

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Log a row at its step."""
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        """Finish this attempt of the run."""
        self._run.finish()
