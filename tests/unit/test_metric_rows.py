"""Rows of metrics.jsonl that somebody, or a crash, changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.metric_rows import RowReader, read_rows

ROWS = '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n'


NO_ROWS = ("x{", "[]", "3", "null", '{"loss": 1}', '{"step": "2"}', "\0" * 20, "[" * 100_000)


@pytest.mark.parametrize("line", NO_ROWS, ids=range(len(NO_ROWS)))
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{ROWS}{line}\n{ROWS}")
    with pytest.raises(RecipeError, match=r"metrics\.jsonl line 3 is no row of metrics"):
        read_rows(tmp_path)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(ROWS.encode() + b"\xff\xfe\n")
    with pytest.raises(RecipeError, match="line 3 is no row"):
        read_rows(tmp_path)


@pytest.mark.parametrize("end", ["", '{"step": 3, "lo', "\0\0\0"])
def test_a_last_line_that_was_cut_off_does_not_count(tmp_path: Path, end: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(ROWS + end)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]


def test_numbers_that_are_not_finite_and_odd_texts_are_rows(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "grad_norm": Infinity, "said": "\\ud800"}\n')
    (row,) = RowReader(tmp_path / "metrics.jsonl").read()
    assert row["loss"] != row["loss"] and row["grad_norm"] == float("inf") and row["said"] == "\ud800"


def test_lines_without_a_row_and_the_mark_of_an_encoding_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\xef\xbb\xbf" + ROWS.replace("\n", "\r\n\n").encode())
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]


def test_the_later_row_of_a_step_counts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(ROWS + '{"step": 1, "loss": 5.0}\n')
    assert [row["loss"] for row in read_rows(tmp_path)] == [5.0, 2.0]
