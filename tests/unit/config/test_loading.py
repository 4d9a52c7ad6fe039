"""Recipes from YAML: inheritance, overrides, and a sentence for everything that is wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from gspo_megatron.config import RecipeError, save_resolved
from gspo_megatron.config.schema import LOWEST_TEMPERATURE
from gspo_megatron.models import load_recipe, load_resolved

TINY = Path("recipes/tiny_moe.yaml")


def findings_of(path: Path, *overrides: str) -> list[tuple[str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [(finding.code, finding.key, finding.fix) for finding in caught.value.findings]


def test_the_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(TINY, ["trainer.max_steps=7", "objective.clip_high=1e-3"])
    assert recipe.trainer.max_steps == 7
    assert recipe.objective.spec(28).clip_high == 1e-3
    save_resolved(recipe, tmp_path / "recipe.yaml")
    assert load_resolved(tmp_path / "recipe.yaml") == recipe


def test_a_recipe_inherits_and_overrides_its_base() -> None:
    harder, tiny = load_recipe(Path("recipes/tiny_moe_harder.yaml")), load_recipe(TINY)
    assert harder.cold_start is not None and tiny.cold_start is not None
    assert harder.cold_start.steps == 150
    assert harder.cold_start.lr == tiny.cold_start.lr
    assert harder.model == tiny.model


@pytest.mark.parametrize(
    ("override", "code", "key", "fix"),
    [
        ("trainer.tensor_paralel=2", "unknown-key", "trainer.tensor_paralel", "did you mean tensor_parallel?"),
        ("tariner.max_steps=2", "unknown-key", "tariner", "did you mean trainer?"),
        ("batch.updates=5", "rule", "batch", "set prompts to a multiple"),
        ("trainer.max_steps=-1", "wrong-value", "trainer.max_steps", "set a value of that type"),
        ("rollout.temperature=hot", "wrong-value", "rollout.temperature", "write e.g. 0.5 or 1e-6"),
        ("max_steps", "override-form", "max_steps", "write e.g. trainer.max_steps=10"),
        ("rollout.temperature=0.009", "rule", "rollout.temperature", "set 0.01 or more"),
        ("rollout.temperature=0", "wrong-value", "rollout.temperature", "set a value of that type"),
        ("evaluation.temperature=1e-3", "rule", "evaluation.temperature", "set 0.01 or more"),
        ("model.architecture.num_key_value_heads=3", "rule", "model.architecture", "choose one that is"),
    ],
)
def test_a_wrong_key_is_refused_with_its_name_and_a_fix(override: str, code: str, key: str, fix: str) -> None:
    assert (code, key, fix) in findings_of(TINY, override)


def test_the_lowest_temperature_is_that_of_vllm() -> None:
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.origin is not None
    source = Path(found.origin).with_name("sampling_params.py").read_text(encoding="utf-8")
    (line,) = [line for line in source.splitlines() if line.startswith("_MAX_TEMP = ")]
    assert float(line.partition(" = ")[2]) == LOWEST_TEMPERATURE
    assert load_recipe(TINY, ["rollout.temperature=0.01", "evaluation.temperature=0"]).rollout.temperature == 0.01


def test_every_fault_is_reported_at_once() -> None:
    assert len(findings_of(TINY, "trainer.a=1", "rollout.b=2", "batch.updates=5")) == 3


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    assert findings_of(tmp_path / "none.yaml")[0][0] == "recipe-missing"
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    assert findings_of(broken)[0][0] == "recipe-unreadable"
    broken.write_text("- a\n- b\n")
    assert findings_of(broken)[0][0] == "recipe-unreadable"
    broken.write_text("base: broken.yaml\n")
    assert findings_of(broken)[0][0] == "base-cycle"


def test_a_model_directory_without_its_files_is_named(tmp_path: Path) -> None:
    override = (f"model.path={tmp_path}", "model.architecture=null")
    assert findings_of(TINY, *override)[0][:2] == ("model-file-missing", "model.path")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 128}))
    assert findings_of(TINY, *override)[0][:2] == ("model-type-unknown", "model.path")
    (tmp_path / "config.json").write_text("[]")
    assert findings_of(TINY, *override)[0][:2] == ("model-file-broken", "model.path")


def test_rope_settings_are_read_in_both_spellings(tmp_path: Path) -> None:
    values = load_recipe(TINY).arch.to_hugging_face("float32")
    (tmp_path / "config.json").write_text(json.dumps(values))
    override = [f"model.path={tmp_path}", "model.architecture=null"]
    assert load_recipe(TINY, override).arch == load_recipe(TINY).arch
    del values["rope_parameters"]
    values |= {"rope_theta": 1e7, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = load_recipe(TINY, override).arch
    assert found.rope_scaling is not None
    assert (found.rope_theta, found.rope_scaling["factor"]) == (1e7, 4.0)
