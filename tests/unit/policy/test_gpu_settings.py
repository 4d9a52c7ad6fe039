"""Settings that only act on a GPU, each of which cost memory or time on an H100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.models import load_recipe
from gspo_megatron.models.megatron_engine import transformer_arguments
from gspo_megatron.policy import mesh, model, specs

YARN = "model.architecture.rope_scaling={rope_type: yarn, factor: 4.0, original_max_position_embeddings: 64}"
DYNAMIC = "trainer.dynamic_context_parallel=true"


def settings_of(overrides: list[str], engine: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of megatron's configuration, with or without Transformer Engine."""
    given: dict[str, Any] = {}

    def record(**arguments: Any) -> Any:
        given.update(arguments)
        return type("Settings", (), {})()

    monkeypatch.setattr(model, "has_transformer_engine", lambda: engine)
    monkeypatch.setattr(model, "TransformerConfig", record)
    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), overrides)
    model.transformer_config(recipe.arch, recipe.trainer, torch.bfloat16)
    return given


@pytest.mark.parametrize(
    ("overrides", "engine", "fused"),
    [([], True, True), ([YARN], True, False), ([], False, False), ([DYNAMIC], True, False)],
)
def test_rotary_embeddings_are_fused_where_the_kernel_computes_the_same(
    overrides: list[str], engine: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings_of(overrides, engine, monkeypatch)["apply_rope_fusion"] is fused


def test_no_communicator_is_made_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a `device_id` torch makes one for each of megatron's groups: 32 of them took 13 GB of an H100."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(mesh.dist, "init_process_group", lambda *_, **arguments: given.update(arguments))
    mesh.start_world()
    assert given and "device_id" not in given


class Product(torch.nn.Linear):
    """A matrix product of Transformer Engine, as far as its own attribute goes."""

    fuse_wgrad_accumulation = False


def test_products_add_gradients_to_the_float32_buffer() -> None:
    """Megatron's own layers have no such attribute and are left alone."""
    chunk = torch.nn.Sequential(Product(2, 2), torch.nn.Linear(2, 2), Product(2, 2))
    assert specs.fuse_accumulation(chunk) == 2
    assert [getattr(module, "fuse_wgrad_accumulation", None) for module in chunk] == [True, None, True]


@pytest.mark.parametrize(
    ("overrides", "fused"), [([], True), (["trainer.megatron.gradient_accumulation_fusion=false"], False)]
)
def test_accumulation_is_fused_unless_the_recipe_says_otherwise(overrides: list[str], fused: bool) -> None:
    recipe = load_recipe(Path("recipes/qwen3_30b_a3b_gspo.yaml"), overrides)
    arguments = transformer_arguments(recipe.arch, recipe.trainer, "bfloat16", engine=True)
    assert arguments["gradient_accumulation_fusion"] is fused


@pytest.mark.parametrize(("name", "part"), [("qwen3_30b_a3b_gspo", "moe"), ("qwen3_0p6b_gspo", "mlp")])
def test_selective_recomputation_leaves_the_attention_alone(name: str, part: str) -> None:
    """Megatron's own choice is `core_attn`, whose kernel computes its scores again by itself."""
    recipe = load_recipe(Path(f"recipes/{name}.yaml"), ["trainer.recompute=selective"])
    arguments = transformer_arguments(recipe.arch, recipe.trainer, "bfloat16", engine=True)
    assert arguments["recompute_granularity"] == "selective" and arguments["recompute_modules"] == [part]


def test_megatrons_own_layers_do_not_ask_for_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the flag in its configuration Megatron's head refuses to be built without apex."""
    assert settings_of([], True, monkeypatch)["gradient_accumulation_fusion"] is False
