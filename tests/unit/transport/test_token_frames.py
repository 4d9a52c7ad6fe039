"""Requests and frames of samples: what is written is read however it is cut, and what is none of ours is refused."""

from __future__ import annotations

import json
import os
import random
import time
from array import array

import numpy as np
import pytest

from gspo_megatron.transport.token_frames import (
    Frame,
    FrameError,
    FrameReader,
    SamplingRequest,
    read_requests,
    write_frame,
    write_requests,
)

CASES = int(os.environ.get("GSPO_FUZZ", "1000")) // 10


def draw_frame(draw: random.Random) -> Frame:
    tokens, kind = draw.choice([0, 1, 64, draw.randint(0, 300)]), draw.choice([np.uint8, np.uint16])
    shape = (draw.randint(1, 5), draw.randint(1, 4), draw.randint(1, 3))
    rows = np.random.default_rng(draw.randint(0, 99)).integers(0, np.iinfo(kind).max, shape, endpoint=True)
    return Frame(
        draw.randint(0, 2**32 - 1),
        array("i", [draw.randint(-(2**31), 2**31 - 1) for _ in range(tokens)]),
        array("f", [-draw.random() for _ in range(draw.choice([0, tokens]))]),
        rows.astype(kind) if draw.random() < 0.5 else None,
        draw.choice([b"", json.dumps({"finish_reason": "stop"}).encode(), "ö".encode() * draw.randint(0, 50)]),
    )


def same(a: Frame, b: Frame) -> bool:
    routes = (a.routes is None) == (b.routes is None)
    if routes and a.routes is not None and b.routes is not None:
        routes = a.routes.dtype == b.routes.dtype and np.array_equal(a.routes, b.routes)
    plain = [(one.number, one.token_ids, one.logprobs, one.ending) for one in (a, b)]
    return routes and plain[0] == plain[1]


def test_frames_come_back_however_the_stream_is_cut() -> None:
    for number in range(CASES):
        draw = random.Random(number)
        frames = [draw_frame(draw) for _ in range(draw.randint(1, 8))]
        stream = b"".join(map(write_frame, frames))
        cuts = sorted(draw.randint(0, len(stream)) for _ in range(draw.choice([0, 3, 40])))
        reader, found = FrameReader(), []
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            found += reader.feed(stream[start:end])
        assert len(found) == len(frames) and all(map(same, frames, found)), number


def test_a_large_frame_in_small_pieces_is_not_copied_for_each() -> None:
    """Experts of a prompt of 100,000 tokens are 38 MB; joined at each piece, these 16 MiB would be 32 GiB of copies."""
    routes = np.arange(16 << 20, dtype=np.uint32).astype(np.uint8).reshape(-1, 64, 8)
    stream = write_frame(Frame(1, array("i"), array("f"), routes))

    def seconds(piece: int) -> float:
        reader, started = FrameReader(), time.process_time()
        found = [frame for at in range(0, len(stream), piece) for frame in reader.feed(stream[at : at + piece])]
        assert len(found) == 1 and found[0].routes is not None and np.array_equal(found[0].routes, routes)
        return time.process_time() - started

    assert seconds(4096) < 20 * (seconds(len(stream)) + 0.01)


@pytest.mark.parametrize(("at", "byte"), [(0, b"X"), (3, b"2"), (28, b"\x03"), (28, b"\x00")])
def test_bytes_that_begin_no_frame_are_refused(at: int, byte: bytes) -> None:
    frame = write_frame(Frame(1, array("i", [1, 2])))
    with pytest.raises(FrameError, match="begins no frame"):
        list(FrameReader().feed(frame[:at] + byte + frame[at + 1 :]))


def test_requests_come_back() -> None:
    for number in range(CASES):
        draw = random.Random(number)
        asked = [
            SamplingRequest(
                f"{place}-{draw.random()}",
                array("i", [draw.randint(0, 2**31 - 1) for _ in range(draw.randint(1, 40))]),
                {"seed": draw.randint(0, 2**63 - 1), "temperature": draw.random(), "stop_token_ids": [1, 10, 2]},
            )
            for place in range(draw.randint(1, 6))
        ]
        assert read_requests(write_requests(asked)) == asked, number


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\n", b"{}\n", b"[]\n", b'{"requests": []}\n', b'{"requests": [{"length": 1}]}\n1234',
        b'{"requests": [{"request_id": "a", "length": 2, "sampling_params": {}}]}\n1234',
        b'{"requests": [{"request_id": "a", "length": 0, "sampling_params": {}}]}\n',
        b'{"requests": [{"request_id": "a", "length": "1", "sampling_params": {}}]}\n1234', b"\xff\n",
    ],
)  # fmt: skip
def test_a_body_that_asks_for_nothing_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError, match="asks for no samples"):
        read_requests(body)
