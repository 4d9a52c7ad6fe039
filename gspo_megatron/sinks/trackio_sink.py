"""trackio. Without network its database is RUN_DIR/sinks/trackio: `TRACKIO_DIR=... trackio show --project PROJECT`."""

from __future__ import annotations

import os
from collections.abc import Mapping

from gspo_megatron.sinks.sink_protocol import SinkRun


class TrackioSink:
    """One trackio run over all attempts, by its name. Of a step that is done again both values stay."""

    def __init__(self, run: SinkRun) -> None:
        if not run.online:
            # Read when the library is imported.
            os.environ["TRACKIO_DIR"] = str(run.directory)
            os.environ.pop("TRACKIO_SPACE_ID", None)
        import trackio  # pyright: ignore[reportMissingImports]

        self._run = trackio.init(
            project=run.project, name=f"{run.name}-{run.id[:8]}", config=run.recipe, resume="allow", embed=False
        )

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Log a row at its step."""
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()
