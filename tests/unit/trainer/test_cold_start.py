"""The cache of first weights, which runs share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from gspo_megatron.trainer.cold_start import publish


def write_weights(directory: Path, words: str) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model-00001.safetensors").write_text(words)
    return directory


def test_of_runs_that_make_the_weights_at_once_one_is_the_first(tmp_path: Path) -> None:
    runs, together = 8, Barrier(8)

    def make(run: int) -> str:
        own = write_weights(tmp_path / f"weights.{run}", str(run))
        together.wait()
        publish(own, tmp_path / "weights")
        return (tmp_path / "weights" / "model-00001.safetensors").read_text()

    with ThreadPoolExecutor(runs) as pool:
        loaded = set(pool.map(make, range(runs)))
    assert len(loaded) == 1, "all of them go on with the same weights"
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_what_is_no_cache_stays_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "notes.txt").touch()
    own = write_weights(tmp_path / "own", "0")
    with pytest.raises(OSError, match="weights"):
        publish(own, tmp_path / "weights")
    assert (tmp_path / "weights" / "notes.txt").exists() and own.is_dir()
