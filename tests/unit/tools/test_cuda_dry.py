"""Steps of `make cuda-dry`, which itself takes gigabytes and minutes."""

from __future__ import annotations

from pathlib import Path

from tests.places import ROOT
from tools.cuda_dry import GPU_RECIPES, pins_hash, steps


def test_every_shipped_recipe_of_gpus_is_held_against_vllm() -> None:
    arguments = dict(steps(Path("python")))["arguments"]
    assert len(GPU_RECIPES) >= 6
    assert set(arguments[3:]) == {str(path.relative_to(ROOT)) for path in GPU_RECIPES}


def test_steps_name_files_that_exist() -> None:
    words = [word for _, command in steps(Path("python")) for word in command]
    named = [word for word in words if word.startswith(("tools/", "recipes/"))]
    assert named and all((ROOT / word).is_file() for word in named)
    assert len(pins_hash()) == 64
