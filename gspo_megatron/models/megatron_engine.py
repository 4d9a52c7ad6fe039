"""The arguments of Megatron's configurations as plain values, which `policy` turns into torch's."""

from __future__ import annotations

from typing import Any, Protocol

from gspo_megatron.config.engine_sections import SIGNATURES
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.trainer_section import TrainerSection
from gspo_megatron.models.pipeline_stages import stage_arguments
from gspo_megatron.models.registry import family_of


class AdamSettings(Protocol):
    """What the section `optimizer` and the settings of a phase have in common."""

    @property
    def lr(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip_grad(self) -> float: ...


def transformer_arguments(arch: Architecture, trainer: TrainerSection, dtype: str, engine: bool) -> dict[str, Any]:
    """Arguments of `TransformerConfig`. Types of torch are given by name, the activation as `silu`.

    Args:
        arch: of the model.
        trainer: layout, recomputation, and what the recipe passes on.
        dtype: of the weights: `bfloat16`, `float32`; `float64` in tests.
        engine: whether Transformer Engine computes the layers, which it does on a GPU only.
    """
    ours: dict[str, Any] = {
        "num_layers": arch.num_hidden_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.intermediate_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_key_value_heads,
        "kv_channels": arch.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": "silu",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == "bfloat16",
        "tensor_model_parallel_size": trainer.tensor_parallel,
        "sequence_parallel": trainer.tensor_parallel > 1,
        "context_parallel_size": trainer.context_parallel,
        # With a loss divisor of its own per token Megatron would rescale gradients by the local token count.
        "calculate_per_token_loss": False,
        "variable_seq_lengths": True,
        "perform_initialization": False,
        "bias_activation_fusion": engine,
        "bias_dropout_fusion": engine,
        "masked_softmax_fusion": False,
        # The fused kernel lacks YaRN's factor, which scales queries and keys, and takes the place of a rank from the
        # group of all context-parallel ranks; `rotary.py` has the factor, and the place in each pack.
        "apply_rope_fusion": engine and arch.rope_scaling is None and not trainer.dynamic_context_parallel,
        "gradient_accumulation_fusion": engine,
        "deallocate_pipeline_outputs": True,
        **family_of(arch).megatron_settings(arch).transformer,
        **_pipeline(arch, trainer),
        **_experts(arch, trainer, dtype, engine),
        **_recompute(arch, trainer),
    }
    return ours | passed_on(trainer, "TransformerConfig")


def data_parallel_arguments(trainer: TrainerSection, dtype: str, distributes: bool) -> dict[str, Any]:
    """Arguments of `DistributedDataParallelConfig`.

    Args:
        trainer: what the recipe passes on.
        dtype: of the weights.
        distributes: whether the replicas share the optimizer's states.
    """
    ours = {
        "grad_reduce_in_fp32": dtype != "float64",
        "overlap_grad_reduce": False,
        "use_distributed_optimizer": distributes,
    }
    return ours | passed_on(trainer, "DistributedDataParallelConfig")


def optimizer_arguments(adam: AdamSettings, dtype: str, distributes: bool) -> dict[str, Any]:
    """Arguments of `OptimizerConfig`.

    Args:
        adam: settings of one phase.
        dtype: of the weights.
        distributes: whether the replicas share the states.
    """
    return {
        "optimizer": "adam",
        "lr": adam.lr,
        "weight_decay": adam.weight_decay,
        "adam_beta1": adam.betas[0],
        "adam_beta2": adam.betas[1],
        "adam_eps": adam.eps,
        "clip_grad": adam.clip_grad,
        "bf16": dtype == "bfloat16",
        "params_dtype": dtype,
        "use_distributed_optimizer": distributes,
    }


def passed_on(trainer: TrainerSection, kind: str) -> dict[str, Any]:
    """What `trainer.megatron` holds for one of Megatron's classes; lists as lists."""
    given = trainer.megatron.given()
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if name in SIGNATURES["megatron"][kind]
    }


def _pipeline(arch: Architecture, trainer: TrainerSection) -> dict[str, Any]:
    return {
        "pipeline_model_parallel_size": trainer.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": trainer.virtual_pipeline,
        **stage_arguments(arch, trainer),
        # With two stages the batched order of sends and receives swaps activations and gradients between the same two
        # peers; point-to-point calls in their own order do not.
        "overlap_p2p_comm": trainer.virtual_pipeline is not None,
        "batch_p2p_comm": trainer.virtual_pipeline is None,
    }


def _experts(arch: Architecture, trainer: TrainerSection, dtype: str, engine: bool) -> dict[str, Any]:
    # Megatron refuses variable_seq_lengths with its default dispatcher, in a dense model too.
    scheduler = {"moe_token_dispatcher_type": "alltoall"}
    if not arch.num_experts:
        return scheduler
    return scheduler | {
        "moe_router_dtype": "fp64" if dtype == "float64" else "fp32",
        "moe_router_load_balancing_type": "aux_loss" if trainer.aux_loss_coefficient else "none",
        "moe_aux_loss_coeff": trainer.aux_loss_coefficient,
        "moe_grouped_gemm": engine,
        "moe_permute_fusion": engine,
        "expert_model_parallel_size": trainer.expert_parallel,
        "expert_tensor_parallel_size": trainer.expert_tensor_parallel,
    }


def recomputed_modules(arch: Architecture, trainer: TrainerSection) -> tuple[str, ...]:
    """Parts of a layer that `recompute=selective` repeats, in Megatron's words; none of them for another mode."""
    if trainer.recompute != "selective":
        return ()
    # The attention kernel computes its scores again by itself: to repeat it would cost time and save nothing.
    return trainer.megatron.given().get("recompute_modules", ("moe" if arch.num_experts else "mlp",))


def _recompute(arch: Architecture, trainer: TrainerSection) -> dict[str, Any]:
    if trainer.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if trainer.recompute == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(recomputed_modules(arch, trainer)),
        }
    return {}
