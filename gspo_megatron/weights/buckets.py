"""How named tensors are cut into packed transfers: one deterministic plan that sender and receiver both compute."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIB = 1 << 20
ALIGNMENT = 16
"""Every piece starts at a multiple of this many bytes, so that a receiver can view it in its own type."""
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """One logical (Hugging Face) tensor of a weight update."""

    name: str
    """`model.layers.0.self_attn.q_proj.weight`"""
    dtype: str
    """A key of `ITEM_BYTES`: `float32`."""
    shape: tuple[int, ...]
    """`(128, 128)`"""

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of bytes of one tensor at its place in a bucket."""

    tensor: int
    """Index in the manifest."""
    start: int
    """First byte within the tensor."""
    stop: int
    """One past the last byte within the tensor."""
    offset: int
    """First byte within the bucket, a multiple of `ALIGNMENT`."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """One packed transfer."""

    pieces: tuple[Piece, ...]
    """In manifest order."""
    num_bytes: int
    """Bytes on the wire, gaps of the alignment included."""


def read_manifest(rows: Iterable[Sequence[object]]) -> list[TensorMeta]:
    """Typed manifest from `[name, dtype, shape]` rows, as JSON brings them.

    Raises:
        ValueError: a name given twice, an unknown type, a shape that is no list of sizes.
    """
    manifest = []
    for name, dtype, shape in rows:
        if dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {name} has dtype {dtype}; a weight update carries {', '.join(ITEM_BYTES)}")
        if not isinstance(shape, list | tuple) or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"tensor {name} has shape {shape}; give a list of positive sizes")
        manifest.append(TensorMeta(str(name), str(dtype), tuple(shape)))
    if len({meta.name for meta in manifest}) != len(manifest):
        seen: set[str] = set()
        twice = next(meta.name for meta in manifest if meta.name in seen or seen.add(meta.name))
        raise ValueError(f"tensor {twice} is twice in the manifest; send every tensor once")
    return manifest


def plan_buckets(manifest: Sequence[TensorMeta], bucket_mib: int) -> list[Bucket]:
    """Fill buckets of at most `bucket_mib` MiB in manifest order; a tensor that does not fit is cut.

    A cut falls on a multiple of `ALIGNMENT`, so no value is ever split. A tensor that would fit into a bucket of its
    own is not cut but opens the next bucket: the receiver then needs no second copy of it.
    """
    limit = bucket_mib * MIB
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    used = 0

    def close() -> None:
        nonlocal pieces, used
        if pieces:
            buckets.append(Bucket(tuple(pieces), used))
        pieces, used = [], 0

    for index, meta in enumerate(manifest):
        start = 0
        while start < meta.num_bytes:
            offset = -(-used // ALIGNMENT) * ALIGNMENT
            rest = meta.num_bytes - start
            if offset + rest > limit and (offset >= limit or rest <= limit):
                close()
                continue
            size = min(rest, limit - offset)
            pieces.append(Piece(index, start, start + size, offset))
            start, used = start + size, offset + size
    close()
    return buckets
