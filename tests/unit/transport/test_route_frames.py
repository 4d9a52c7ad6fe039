"""Frames of routes: what is written is read, and what is none of ours is refused."""

from __future__ import annotations

import numpy as np
import pytest

from gspo_megatron.transport.route_frames import FrameError, read_frame, write_frame


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_frame_comes_back(kind: type[np.unsignedinteger]) -> None:
    rows = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (5, 3, 2), endpoint=True).astype(kind)
    line, rest = write_frame(rows).split(b"\n", 1)
    frame = read_frame(line + b"\n")
    assert frame is not None and frame.num_bytes == rows.nbytes == len(rest) - 1 and rest.endswith(b"\n")
    found = frame.read(rest)
    assert found.dtype == kind and np.array_equal(found, rows)


@pytest.mark.parametrize("line", [b"data: {}\n", b"\n", b"", b"routes\n"])
def test_other_lines_are_no_frames(line: bytes) -> None:
    assert read_frame(line) is None


@pytest.mark.parametrize("words", ["", "1 2 3", "1 2 3 4", "0 2 3 1", "1 -2 3 1", "1 2 3 1 1", "a 2 3 1", "1 2 3 0"])
def test_a_line_without_a_shape_is_refused(words: str) -> None:
    with pytest.raises(FrameError, match="begins no frame of routes"):
        read_frame(f"routes: {words}\n".encode())
