"""From a recipe to Megatron's model: the transformer configuration and the chunks of this rank."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.config.trainer_section import TrainerSection
from gspo_megatron.models.registry import family_of
from gspo_megatron.policy.offload import offload_inputs
from gspo_megatron.policy.rotary import PackedModel
from gspo_megatron.policy.specs import has_transformer_engine, reference_spec, transformer_engine_spec


def transformer_config(arch: Architecture, trainer: TrainerSection, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of a model under the recipe's layout."""
    engine, settings = has_transformer_engine(), family_of(arch).megatron_settings(arch)
    config = TransformerConfig(
        num_layers=arch.num_hidden_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.intermediate_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_key_value_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=trainer.tensor_parallel,
        sequence_parallel=trainer.tensor_parallel > 1,
        context_parallel_size=trainer.context_parallel,
        # With a loss divisor of its own per token Megatron would rescale gradients by the local token count.
        calculate_per_token_loss=False,
        variable_seq_lengths=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        bias_activation_fusion=engine,
        bias_dropout_fusion=engine,
        masked_softmax_fusion=False,
        # The fused kernel lacks YaRN's factor, which scales queries and keys; `rotary.py` has it.
        apply_rope_fusion=engine and arch.rope_scaling is None,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=True,
        **settings.transformer,
        **_pipeline_settings(trainer),
        **_expert_settings(arch, trainer, dtype, engine),
        **_recompute_settings(arch, trainer),
    )
    for name, value in settings.attributes.items():
        setattr(config, name, value)
    return config


def assert_settings(config: TransformerConfig, trainer: TrainerSection) -> None:
    """Check settings that would change the objective without an error."""
    assert not config.calculate_per_token_loss, "calculate_per_token_loss multiplies every gradient by the token count"
    assert config.moe_aux_loss_coeff == trainer.aux_loss_coefficient, (
        f"the built model has an auxiliary loss of {config.moe_aux_loss_coeff}, "
        f"the recipe asks for {trainer.aux_loss_coefficient}"
    )


def _pipeline_settings(trainer: TrainerSection) -> dict[str, Any]:
    return {
        "pipeline_model_parallel_size": trainer.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": trainer.virtual_pipeline,
        "num_layers_in_first_pipeline_stage": trainer.first_stage_layers,
        "num_layers_in_last_pipeline_stage": trainer.last_stage_layers,
        # With two stages the batched order of sends and receives swaps activations and gradients between the same two
        # peers; point-to-point calls in their own order do not.
        "overlap_p2p_comm": trainer.virtual_pipeline is not None,
        "batch_p2p_comm": trainer.virtual_pipeline is None,
    }


def _expert_settings(arch: Architecture, trainer: TrainerSection, dtype: torch.dtype, engine: bool) -> dict[str, Any]:
    # Megatron refuses variable_seq_lengths with its default dispatcher, in a dense model too.
    scheduler = {"moe_token_dispatcher_type": "alltoall"}
    if not arch.num_experts:
        return scheduler
    return scheduler | {
        "moe_router_dtype": "fp64" if dtype is torch.float64 else "fp32",
        "moe_router_load_balancing_type": "aux_loss" if trainer.aux_loss_coefficient else "none",
        "moe_aux_loss_coeff": trainer.aux_loss_coefficient,
        "moe_grouped_gemm": engine,
        "moe_permute_fusion": engine,
        "expert_model_parallel_size": trainer.expert_parallel,
        "expert_tensor_parallel_size": trainer.expert_tensor_parallel,
    }


def _recompute_settings(arch: Architecture, trainer: TrainerSection) -> dict[str, Any]:
    if trainer.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if trainer.recompute == "selective":
        # The attention kernel computes its scores again by itself: to repeat it would cost time and save nothing.
        return {"recompute_granularity": "selective", "recompute_modules": ["moe" if arch.num_experts else "mlp"]}
    return {}


def build_chunks(recipe: Recipe, device: torch.device, dtype: torch.dtype | None = None) -> list[PackedModel]:
    """The model chunks of this rank: one, or one for each virtual stage. Weights are uninitialised until loaded."""
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
        ).to(device)
        if recipe.trainer.offload_activations:
            offload_inputs(chunk.decoder)
        chunks.append(chunk)
    return chunks
