"""What a job refuses to go on with: another job's run, another recipe's run."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.config import Recipe, RecipeError, save_resolved
from gspo_megatron.models import load_recipe
from launch.lib.resume import MAY_CHANGE, MUST_STAY, flatten, refuse_other_job, refuse_other_recipe
from tests.places import ROOT


def recipe(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "tiny_moe.yaml", overrides)


@pytest.mark.parametrize(
    "override",
    ["objective.clip_low=0.001", "optimizer.lr=1e-5", "rollout.temperature=0.9", "rollout.max_answer_tokens=20",
     "batch.prompts=32", "run.seed=3", "trainer.aux_loss_coefficient=0.01", "data.held_out=100"],
)  # fmt: skip
def test_what_changes_the_algorithm_is_refused_by_key(tmp_path: Path, override: str) -> None:
    save_resolved(recipe(), tmp_path / "recipe.resolved.yaml")
    key = override.partition("=")[0]
    with pytest.raises(RecipeError, match=rf"\[resume-other-recipe\] {key}: .* here, .* in {tmp_path}"):
        refuse_other_recipe(tmp_path, recipe(override))


def test_machines_and_what_saves_memory_may_change(tmp_path: Path) -> None:
    refuse_other_recipe(tmp_path, recipe())
    save_resolved(recipe(), tmp_path / "recipe.resolved.yaml")
    refuse_other_recipe(tmp_path, recipe())
    more = ("trainer.max_steps=99", "placement.nodes=2", "rollout.servers=2", "checkpoint.every=1")
    less = ("trainer.micro_batch_tokens=2048", "rollout.max_concurrency=64", "rollout.kv_cache_gib=0.5")
    refuse_other_recipe(tmp_path, recipe(*more, *less))


def test_every_name_in_the_lists_is_a_key() -> None:
    keys = [*flatten(recipe().model_dump(mode="json")), *Recipe.model_fields]
    for name in (*MAY_CHANGE, *MUST_STAY):
        assert any(key.startswith(name) for key in keys), name


def test_a_run_whose_job_is_alive_is_left_alone(tmp_path: Path) -> None:
    refuse_other_job(tmp_path, "8", ["7"])
    (tmp_path / "attempt").write_text("2 7\n")
    refuse_other_job(tmp_path, "8", ["6", "8"])
    refuse_other_job(tmp_path, "7", ["7"])
    with pytest.raises(RecipeError, match="job 7 is running in"):
        refuse_other_job(tmp_path, "8", ["7"])
