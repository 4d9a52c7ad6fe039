"""How a server's routes travel: as binary frames within the stream of the response that they belong to.

A frame is one line, `routes: ROWS LAYERS K BYTES`, then ROWS x LAYERS x K expert numbers of BYTES bytes, little-endian,
then a line end. It holds the rows that follow those of the frame before it, and comes before the text of the tokens
that were sampled from it: whoever has a token has the routes of all tokens before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gspo_megatron.types import ROUTE_TYPES

HEADER = "x-gspo-routes"
"""Header of a request whose response carries frames."""
MARK = b"routes: "


class FrameError(ValueError):
    """A frame that no server of ours writes."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The first line of a frame."""

    shape: tuple[int, int, int]
    """Rows, layers, experts a token."""
    item_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of the numbers behind the line, without the line end that closes the frame."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.item_bytes

    def read(self, body: bytes) -> np.ndarray:
        """[rows, layers, k] of the `num_bytes` bytes behind the line."""
        return np.frombuffer(body[: self.num_bytes], ROUTE_TYPES[self.item_bytes]).reshape(self.shape)


def write_frame(rows: np.ndarray) -> bytes:
    """The frame of [rows, layers, k] expert numbers of one or two bytes."""
    kind = np.dtype(ROUTE_TYPES[rows.dtype.itemsize])
    first = MARK + " ".join(map(str, (*rows.shape, kind.itemsize))).encode()
    return b"\n".join((first, rows.astype(kind, copy=False).tobytes(), b""))


def read_frame(line: bytes) -> Frame | None:
    """The frame that a line begins; None for any other line. Raises FrameError for numbers that are no shape."""
    if not line.startswith(MARK):
        return None
    words = line[len(MARK) :].split()
    numbers = [int(word) for word in words if word.isdigit()]
    if len(words) != 4 or len(numbers) != 4 or min(numbers) < 1 or numbers[3] not in ROUTE_TYPES:
        raise FrameError(f"{line[:100]!r} begins no frame of routes")
    return Frame((numbers[0], numbers[1], numbers[2]), numbers[3])
