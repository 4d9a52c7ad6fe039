"""Rows of Parquet files and of directories that `datasets` saved (`save_to_disk`), as plain values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.data.line_faults import broken_file, broken_line

PARQUET = b"PAR1"
"""First bytes of a Parquet file."""
STATE, SPLITS = "state.json", "dataset_dict.json"
"""A saved dataset has the first, a dictionary of them the second."""
BATCH_ROWS = 1024


def is_columnar(path: Path) -> bool:
    """Whether a path is a directory or a Parquet file. Raises OSError for one that cannot be read."""
    if path.is_dir():
        return True
    with path.open("rb") as file:
        return file.read(len(PARQUET)) == PARQUET


def read_columns(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`FILE row N`, row) of every row.

    A key without a value is left out: a column has a place for it in every row, a line of JSONL has not.

    Args:
        path: a Parquet file, or a directory that `datasets` saved.
        key: recipe key that names it.

    Raises:
        RecipeError: what cannot be read, in a sentence.
    """
    try:
        if not path.is_dir():
            yield from _number(path, _parquet_batches(path), key)
            return
        for file in _files_of(path, key):
            yield from _number(file, _arrow_batches(file), key)
    except RecipeError:
        raise
    # pyarrow's own errors, of several kinds, and what a broken state.json leads to.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise broken_file(key, f"{path} cannot be read ({reason})", "write it again, or name another file") from None


def _files_of(directory: Path, key: str) -> list[Path]:
    """The files of a saved dataset, in their order."""
    if (directory / SPLITS).is_file():
        splits = json.loads((directory / SPLITS).read_text(encoding="utf-8"))["splits"]
        fix = f"name one of them: {directory / str(splits[0])}" if splits else "save one with rows"
        raise broken_file(key, f"{directory} holds the splits {', '.join(map(str, splits))}", fix)
    if not (directory / STATE).is_file():
        held = ", ".join(sorted(path.name for path in directory.iterdir())[:5]) or "nothing"
        fix = "name a file, or a directory that `datasets` saved by save_to_disk"
        raise broken_file(key, f"{directory} is a directory without {STATE} (it holds {held})", fix)
    state = json.loads((directory / STATE).read_text(encoding="utf-8"))
    if state.get("_indices_files") or state.get("_indices_data_files"):
        fix = "call flatten_indices() before save_to_disk()"
        raise broken_file(key, f"{directory} is a selection of rows that it holds beside them", fix)
    return [directory / str(entry["filename"]) for entry in state["_data_files"]]


def _parquet_batches(file: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as opened:
        yield from opened.iter_batches(BATCH_ROWS)


def _arrow_batches(file: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
        for batch in reader:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)


def _number(file: Path, batches: Iterable[Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in batches:
        names = batch.schema.names
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise broken_file(key, f"{file} has the column {twice[0]!r} twice", "keep one of them")
        for place in range(batch.num_rows):
            number += 1
            where = f"{file} row {number}"
            try:
                (row,) = batch.slice(place, 1).to_pylist()
            except (ValueError, OverflowError, RecursionError) as error:  # e.g. bytes of a text that are not UTF-8
                raise broken_line(key, where, f"cannot be read ({error})", "correct the row") from None
            yield where, without_gaps(row)


def without_gaps(value: Any) -> Any:
    """Return a value without the keys that have none: all objects of a column share their keys."""
    if isinstance(value, dict):
        return {name: without_gaps(inner) for name, inner in value.items() if inner is not None}
    return [without_gaps(inner) for inner in value] if isinstance(value, list) else value
