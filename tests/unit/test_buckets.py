"""The bucket plan: every byte once, in order, in buckets no larger than asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo_megatron.weights.buckets import ALIGNMENT, MIB, TensorMeta, plan_buckets, read_manifest

SHAPES = st.lists(
    st.tuples(st.sampled_from(["float32", "bfloat16"]), st.integers(1, 700), st.integers(1, 700)), max_size=30
)


@given(SHAPES)
def test_every_byte_travels_once_in_order(shapes: list[tuple[str, int, int]]) -> None:
    manifest = [TensorMeta(f"t{i}", dtype, (rows, columns)) for i, (dtype, rows, columns) in enumerate(shapes)]
    reached = [0] * len(manifest)
    latest = 0
    for bucket in plan_buckets(manifest, 1):
        end = 0
        for piece in bucket.pieces:
            assert piece.tensor >= latest and piece.start == reached[piece.tensor] < piece.stop
            assert piece.offset >= end and piece.offset % ALIGNMENT == 0 and piece.offset - end < ALIGNMENT
            assert piece.start % ALIGNMENT == 0
            latest, reached[piece.tensor] = piece.tensor, piece.stop
            end = piece.offset + piece.stop - piece.start
        assert end == bucket.num_bytes <= MIB
    assert reached == [meta.num_bytes for meta in manifest]


def test_only_a_tensor_larger_than_a_bucket_is_cut() -> None:
    manifest = [TensorMeta("small", "float32", (4,)), TensorMeta("one", "float32", (MIB // 4,))]
    manifest.append(TensorMeta("large", "bfloat16", (3 * MIB // 4,)))  # 1.5 MiB
    buckets = plan_buckets(manifest, 1)
    assert [[(p.tensor, p.stop - p.start) for p in bucket.pieces] for bucket in buckets] == [
        [(0, 16)],
        [(1, MIB)],
        [(2, MIB)],
        [(2, MIB // 2)],
    ]


def test_no_tensors_no_buckets() -> None:
    assert plan_buckets([], 64) == []


def test_a_scalar_is_a_tensor() -> None:
    assert [bucket.num_bytes for bucket in plan_buckets([TensorMeta("s", "bfloat16", ())], 1)] == [2]


def test_manifest_rows_are_checked() -> None:
    assert read_manifest([["a", "float32", [2, 3]]]) == [TensorMeta("a", "float32", (2, 3))]
    with pytest.raises(ValueError, match="tensor b is twice"):
        read_manifest([["b", "float32", [1]], ["b", "float32", [1]]])
    with pytest.raises(ValueError, match="tensor c has dtype int8; a weight update carries float32"):
        read_manifest([["c", "int8", [1]]])
    with pytest.raises(ValueError, match="tensor d has shape"):
        read_manifest([["d", "float32", [0]]])
