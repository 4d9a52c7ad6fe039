"""How requests for samples reach a server of ours, and how tokens come back: binary, many responses in one stream.

A request body is one line of JSON, `{"requests": [{"request_id", "length", "sampling_params"}, ...]}`, then the ids of
all requests one after the other, int32. `sampling_params` are vLLM's own.

The response is a stream of frames in any order of the requests. A frame is a header (magic `GSF1`, number of the
request in the body, tokens, log-probs, bytes of the ending, rows, layers and experts of the routes, bytes of one of
their numbers, 3 zero bytes), then int32 ids, float32 log-probs, routes, and the ending, JSON of the last frame of a
request. Routes are those of the tokens that follow the ones of the frame before: whoever has a token has the routes of
all tokens before it. All numbers are little-endian.
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gspo_megatron.types import ROUTE_TYPES

MAGIC = b"GSF1"
HEADER = struct.Struct("<4sIIIIIHHB3x")


class FrameError(ValueError):
    """A body or a frame that none of ours writes."""


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """One request for samples."""

    request_id: str
    token_ids: array[int]
    """[n] ids that the response continues."""
    parameters: dict[str, Any]
    """vLLM's `SamplingParams` by name."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What arrives for one request at a time."""

    number: int
    """Place of the request in its body."""
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    """[n] sampled ids."""
    logprobs: array[float] = field(default_factory=lambda: array("f"))
    """[n] their log-probs; [prompt length - 1] where those of the prompt were asked for; empty where none were."""
    routes: np.ndarray | None = None
    """[rows, layers, k] experts; None = none came."""
    ending: bytes = b""
    """JSON; empty = more will come."""


def write_requests(requests: Sequence[SamplingRequest]) -> bytes:
    """The body that asks for samples."""
    heads = [
        {"request_id": one.request_id, "length": len(one.token_ids), "sampling_params": one.parameters}
        for one in requests
    ]
    return b"".join((json.dumps({"requests": heads}).encode(), b"\n", *(_to_bytes(one.token_ids) for one in requests)))


def read_requests(body: bytes) -> list[SamplingRequest]:
    """The requests of a body. Raises FrameError for one that `write_requests` does not write."""
    end = body.find(b"\n")
    try:
        heads = json.loads(body[: max(end, 0)])["requests"]
        lengths = [head["length"] for head in heads]
        if min(lengths) < 1 or end + 1 + 4 * sum(lengths) != len(body):
            raise FrameError(f"{sum(lengths)} ids are announced and {len(body) - end - 1} bytes follow")
        found, at = [], end + 1
        for head, length in zip(heads, lengths, strict=True):
            ids = _read_array("i", body, at, length)
            found.append(SamplingRequest(head["request_id"], ids, head["sampling_params"]))
            at += 4 * length
        return found
    except (ValueError, LookupError, TypeError) as error:
        raise FrameError(f"a body of {len(body)} bytes asks for no samples: {type(error).__name__}: {error}") from None


def write_frame(frame: Frame) -> bytes:
    """A frame as it travels."""
    rows = b""
    shape = (0, 0, 0, 1)
    if frame.routes is not None:
        kind = np.dtype(ROUTE_TYPES[frame.routes.dtype.itemsize])
        rows, shape = frame.routes.astype(kind, copy=False).tobytes(), (*frame.routes.shape, kind.itemsize)
    lengths = (len(frame.token_ids), len(frame.logprobs), len(frame.ending))
    header = HEADER.pack(MAGIC, frame.number, *lengths, *shape)
    return b"".join((header, _to_bytes(frame.token_ids), _to_bytes(frame.logprobs), rows, frame.ending))


class FrameReader:
    """Cuts a stream of bytes, however it arrives, into frames."""

    def __init__(self) -> None:
        self._kept: list[bytes] = []
        self._missing = 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that these bytes complete. Raises FrameError where no frame begins."""
        self._kept.append(data)
        self._missing -= len(data)
        if self._missing > 0:  # A frame of recorded experts comes in thousands of pieces, joined once.
            return
        data, at, needed = b"".join(self._kept), 0, HEADER.size
        while len(data) - at >= HEADER.size:
            magic, number, tokens, logprobs, ending, *shape, item = HEADER.unpack_from(data, at)
            if magic != MAGIC or item not in ROUTE_TYPES:
                raise FrameError(f"{data[at : at + HEADER.size]!r} begins no frame")
            ids = at + HEADER.size
            rows = ids + 4 * (tokens + logprobs)
            text = rows + shape[0] * shape[1] * shape[2] * item
            if len(data) < text + ending:
                needed = text + ending - at
                break
            at = text + ending
            yield Frame(
                number,
                _read_array("i", data, ids, tokens),
                _read_array("f", data, ids + 4 * tokens, logprobs),
                np.frombuffer(data[rows:text], ROUTE_TYPES[item]).reshape(shape) if shape[0] else None,
                data[text:at],
            )
        self._kept, self._missing = [data[at:]], needed - (len(data) - at)


def _to_bytes(values: array[Any]) -> bytes:
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()


def _read_array(code: str, data: bytes, at: int, length: int) -> array[Any]:
    values: array[Any] = array(code)
    values.frombytes(data[at : at + 4 * length])
    if sys.byteorder == "big":
        values.byteswap()
    return values
