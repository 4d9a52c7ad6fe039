"""The experts that the sampler chose for the tokens of one response, as they arrive."""

from __future__ import annotations

import numpy as np

from gspo_megatron.transport.token_frames import FrameError


class RecordedRoutes:
    """A growing [rows, layers, k] array: the first rows of prompt and response, without a gap."""

    def __init__(self, rows: np.ndarray | None = None) -> None:
        self._kept: np.ndarray | None = rows
        self._rows = 0 if rows is None else len(rows)

    def __len__(self) -> int:
        return self._rows

    def extend(self, rows: np.ndarray) -> None:
        """Take in the rows that follow. Raises FrameError if they are of another model than those before."""
        kept = self._kept
        if kept is None:
            kept = np.empty((len(rows), *rows.shape[1:]), rows.dtype)
        if kept.shape[1:] != rows.shape[1:] or kept.dtype != rows.dtype:
            raise FrameError(
                f"routes of {rows.shape[1:]} {rows.dtype} follow some of {kept.shape[1:]} {kept.dtype}; a response is "
                "sampled by one model"
            )
        end = self._rows + len(rows)
        if end > len(kept):
            grown = np.empty((max(end, len(kept) * 3 // 2), *kept.shape[1:]), kept.dtype)
            grown[: self._rows] = kept[: self._rows]
            kept = grown
        kept[self._rows : end] = rows
        self._kept, self._rows = kept, end

    def cut(self, rows: int) -> None:
        """Forget the rows from `rows` on."""
        self._rows = min(self._rows, rows)
        if not self._rows:
            self._kept = None

    def copy(self) -> np.ndarray | None:
        """What is there so far; None where nothing is."""
        return None if self._kept is None else self._kept[: self._rows].copy()
