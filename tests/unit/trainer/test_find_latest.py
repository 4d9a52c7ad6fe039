"""Which checkpoint a run goes on from: the newest that can be read; the others are named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from gspo_megatron.trainer.checkpoint import CheckpointError, find_latest
from tests.checkpoints import RANK_FILE, write_checkpoint

CONTROLLER = {
    "stream": {"index": 1, "position": 1, "skipped": {}, "fingerprint": "f"},
    "groups": [],
    "accounting": {"sampled_tokens": 1, "taken": {"tokens": 1, "prompts": 1}, "dropped": {},
                   "carried": {"tokens": 0, "prompts": 0}},
    "store": "carried-00000001",
    "drafts": [],
}  # fmt: skip


@pytest.fixture(autouse=True)
def world(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write(places: Path, step: int, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    place = write_checkpoint(places / f"step_{step:06d}")
    save_file({"value/0/one": torch.zeros(4)}, place / RANK_FILE)
    state = json.loads((place / "state.json").read_text())
    state |= {
        "controller": CONTROLLER,
        "layout": {"world": 1},
        "files": {RANK_FILE: (place / RANK_FILE).stat().st_size},
    }
    change(state)
    (place / "state.json").write_text(json.dumps(state))
    return place


def spoil_header(place: Path) -> None:
    size = (place / RANK_FILE).stat().st_size
    (place / RANK_FILE).write_bytes(b"\xff" * size)


def write_of_save(place: Path, token: str) -> None:
    save_file({"value/0/one": torch.zeros(4)}, place / RANK_FILE, metadata={"save": token})


def mix_saves(place: Path) -> None:
    """Of two checkpoints of one run, as a copy that was interrupted leaves them: names and sizes agree."""
    write_of_save(place, "0a1b2c3e")
    state = json.loads((place / "state.json").read_text())
    state |= {"save": "0a1b2c3d", "files": {RANK_FILE: (place / RANK_FILE).stat().st_size}}
    (place / "state.json").write_text(json.dumps(state))


BROKEN: dict[str, Callable[[Path], object]] = {
    "a file of another save": mix_saves,
    "an empty state": lambda place: (place / "state.json").write_text(""),
    "a file that was cut": lambda place: (place / RANK_FILE).write_bytes(b"short"),
    "a header of other bytes": spoil_header,
}
CHANGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a controller without a stream": lambda state: state.update(controller={"groups": []}),
    "a layout of unknown keys": lambda state: state.update(layout={"world": 1, "ranks": 2}),
}


@pytest.mark.parametrize("fault", [*BROKEN, *CHANGED])
def test_a_newer_one_that_cannot_be_read_is_named(tmp_path: Path, fault: str) -> None:
    said: list[str] = []
    whole = write(tmp_path / "c", 10)
    write(tmp_path / "c", 8)
    place = write(tmp_path / "c", 12, CHANGED.get(fault, lambda _: None))
    BROKEN.get(fault, lambda _: None)(place)
    assert find_latest(tmp_path / "c", said.append) == whole
    (line,) = said
    assert line.startswith("skipped: step_000012: ")


def test_without_one_that_can_be_read_nothing_starts_anew(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "none", print) is None
    for step in (8, 10):
        spoil_header(write(tmp_path / "c", step))
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be read \(step_000010: .*; step_000008: .*anew"
    ):
        find_latest(tmp_path / "c", print)


def test_files_of_its_own_save_are_whole(tmp_path: Path) -> None:
    place = write(tmp_path / "c", 12)
    mix_saves(place)
    write_of_save(place, "0a1b2c3d")
    assert find_latest(tmp_path / "c", print) == place


def test_one_that_is_whole_is_said_nothing_of(tmp_path: Path) -> None:
    said: list[str] = []
    assert find_latest(tmp_path / "c", said.append) is None
    newest = write(tmp_path / "c", 12)
    assert find_latest(tmp_path / "c", said.append) == newest and not said
