"""Steps of `make cuda-dry`, which itself takes gigabytes and minutes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from tests.parallel.engine_narrow import faults_of
from tests.places import ROOT
from tools.cuda_dry import GPU_RECIPES, RESULT, pins_hash, steps


def test_every_shipped_recipe_of_gpus_is_held_against_vllm() -> None:
    arguments = dict(steps(Path("python")))["arguments"]
    assert len(GPU_RECIPES) >= 6
    assert set(arguments[2:]) == {str(path.relative_to(ROOT)) for path in GPU_RECIPES}


def test_steps_name_files_that_exist() -> None:
    words = [word for _, command in steps(Path("python")) for word in command]
    named = [word for word in words if word.startswith(("tools/", "recipes/"))]
    assert named and all((ROOT / word).is_file() for word in named)
    assert len(pins_hash()) == 64
    modules = [words[words.index("-m") + 1] for _, words in steps(Path("python")) if "-m" in words]
    assert all(importlib.util.find_spec(module) for module in modules if module.startswith("tests."))


def test_the_result_is_of_these_pins_and_of_every_step() -> None:
    """After a change of requirements/cuda.txt, or of the steps: `make cuda-dry`, and commit its result."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))["steps"]
    assert set(found) == {name for name, _ in steps(Path("python"))}
    assert {name: result["verdict"] for name, result in found.items()} == dict.fromkeys(found, "passed")
    assert {result["pins"] for result in found.values()} == {pins_hash()}


def test_gradients_that_no_product_adds_are_rounded_once_a_micro_batch() -> None:
    """The committed figures hold the bound, and more than three roundings are a fault with the weight's name."""
    figures = json.loads(RESULT.read_text(encoding="utf-8"))["steps"]["engine in bfloat16"]["figures"]
    found = {name: row for name, row in figures.items() if "others" in row}
    assert len(found) >= 4 and not any(faults_of(name, row) for name, row in found.items())
    coarse = found["TP2"] | {"others": {"q_layernorm.weight": 0.012}}
    assert faults_of("TP2", coarse) == [
        "gradient of q_layernorm.weight is rounded more than once a micro-batch: 1.2e-02"
    ]
