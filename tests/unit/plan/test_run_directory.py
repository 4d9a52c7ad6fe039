"""What stands in a run directory under a name of the run's must be what the run keeps there."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.commands.train_run import prepare_run
from gspo_megatron.config import Recipe
from gspo_megatron.models import load_recipe
from gspo_megatron.plan.rules.run_directory import DIRECTORIES, LINK, findings
from gspo_megatron.run_dir import RunDir
from tests.places import ROOT

NAMES = sorted(name for name, member in vars(RunDir).items() if isinstance(member, property) and name != LINK)


def recipe(run: Path) -> Recipe:
    return load_recipe(ROOT / "recipes" / "tiny_moe.yaml", [f"run.directory={run}"])


@pytest.mark.parametrize("name", NAMES)
def test_a_file_for_a_directory_and_the_other_way_round_are_found(tmp_path: Path, name: str) -> None:
    prepare_run(recipe(tmp_path))
    assert not list(findings(recipe(tmp_path)))
    place: Path = getattr(RunDir(tmp_path), name)
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        place.rename(tmp_path / "elsewhere")
    (place.touch if name in DIRECTORIES else place.mkdir)()
    found = [one.message for one in findings(recipe(tmp_path))]
    kinds = ("a file", "a directory") if name in DIRECTORIES else ("a directory", "a file")
    assert found == [f"{place} is {kinds[0]}; a run keeps {kinds[1]} of that name"]


def test_every_directory_is_a_name_of_a_run() -> None:
    assert set(NAMES) > DIRECTORIES
