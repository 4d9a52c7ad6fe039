"""From a recipe to Megatron's model: the transformer configuration and the chunks of this rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.refusal import refuse
from gspo_megatron.config.schema import Recipe
from gspo_megatron.config.trainer_section import TrainerSection
from gspo_megatron.models.megatron_engine import transformer_arguments
from gspo_megatron.models.registry import family_of
from gspo_megatron.policy.offload import offload_inputs
from gspo_megatron.policy.rotary import PackedModel
from gspo_megatron.policy.specs import (
    fuse_accumulation,
    has_transformer_engine,
    reference_spec,
    transformer_engine_spec,
)
from gspo_megatron.policy.value_head import VALUE_HEAD, ValueHead


def transformer_config(arch: Architecture, trainer: TrainerSection, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of a model under the recipe's layout."""
    engine = has_transformer_engine()
    arguments = transformer_arguments(arch, trainer, str(dtype).removeprefix("torch."), engine)
    # Megatron's own head would need apex for it; the layers are set one by one (`fuse_accumulation`).
    arguments["gradient_accumulation_fusion"] = False
    if "attention_backend" in arguments:
        arguments["attention_backend"] = AttnBackend[arguments["attention_backend"]]
    arguments |= {
        "activation_func": getattr(torch.nn.functional, arguments["activation_func"]),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "use_cpu_initialization": not torch.cuda.is_available(),
    }
    config = TransformerConfig(**arguments)
    for name, value in family_of(arch).megatron_settings(arch).attributes.items():
        setattr(config, name, value)
    return config


def assert_settings(config: TransformerConfig, trainer: TrainerSection) -> None:
    """Check settings that would change the objective without an error."""
    assert not config.calculate_per_token_loss, "calculate_per_token_loss multiplies every gradient by the token count"
    assert config.moe_aux_loss_coeff == trainer.aux_loss_coefficient, (
        f"the built model has an auxiliary loss of {config.moe_aux_loss_coeff}, "
        f"the recipe asks for {trainer.aux_loss_coefficient}"
    )


@contextmanager
def refuse_by_name(trainer: TrainerSection) -> Iterator[None]:
    """Turn what Megatron says of `trainer.megatron` into a RecipeError."""
    try:
        yield
    except (AssertionError, ImportError, ValueError) as error:
        given = trainer.megatron.given()
        if not given:
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise refuse(
            "engine-refuses", "trainer.megatron", f"Megatron refuses {given}: {said}", "remove what it names"
        ) from error


def build_chunks(recipe: Recipe, device: torch.device, dtype: torch.dtype | None = None) -> list[PackedModel]:
    """The model chunks of this rank: one, or one for each virtual stage. Weights are uninitialised until loaded.

    Raises:
        RecipeError: Megatron refuses what `trainer.megatron` says.
    """
    with refuse_by_name(recipe.trainer):
        return _build(recipe, device, dtype)


def _build(recipe: Recipe, device: torch.device, dtype: torch.dtype | None) -> list[PackedModel]:
    arch = recipe.arch
    config = transformer_config(arch, recipe.trainer, dtype or getattr(torch, recipe.model.dtype))
    chunks = []
    for index in range(recipe.trainer.virtual_pipeline or 1):
        stage = index if recipe.trainer.virtual_pipeline else None
        spec: Any = transformer_engine_spec(config) if has_transformer_engine() else reference_spec(config, stage)
        chunk = PackedModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=arch.vocab_size,
            max_sequence_length=arch.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            rotary_base=arch.rope_theta,  # pyright: ignore[reportArgumentType]  any number will do
            vp_stage=stage,
            **family_of(arch).megatron_settings(arch).model,
        )
        if recipe.objective.has_critic and chunk.post_process:
            chunk.add_module(VALUE_HEAD, ValueHead(config, recipe.critic.trunk == "detached"))
        chunk.to(device)
        if recipe.trainer.offload_activations:
            offload_inputs(chunk.decoder)
        if recipe.trainer.megatron.given().get("gradient_accumulation_fusion", True):
            fuse_accumulation(chunk)
        chunks.append(chunk)
    return chunks
