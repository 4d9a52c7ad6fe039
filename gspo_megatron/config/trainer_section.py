"""The section `trainer`: processes, parallel layout and memory of the policy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gspo_megatron.config.base import Section
from gspo_megatron.config.engine_sections import MegatronMap


class TrainerSection(Section):
    """`trainer`: processes, parallel layout and memory of the policy."""

    ranks: int | None = Field(default=None, gt=0)
    """Trainer processes; null = one per GPU, or 2 gloo ranks without a GPU."""
    tensor_parallel: int = Field(default=1, gt=0)
    """Tensor-parallel size (TP). Sequence parallelism is on when it is above 1."""
    pipeline_parallel: int = Field(default=1, gt=0)
    """Pipeline stages (PP)."""
    virtual_pipeline: int | None = Field(default=None, gt=1)
    """Model chunks per pipeline stage (interleaved schedule); null = one. The embedding may count as a layer of the
    first chunk, and the head as one of the last: 94 layers in 8 stages of 4 chunks have 2 there and 3 elsewhere."""
    first_stage_layers: int | None = Field(default=None, gt=0)
    """Layers of the first pipeline stage; null = as many as the others."""
    last_stage_layers: int | None = Field(default=None, gt=0)
    """Layers of the last pipeline stage; null = as many as the others."""
    context_parallel: int = Field(default=1, gt=0)
    """Context-parallel size (CP). Each sequence is cut into 2*CP chunks, two per rank."""
    dynamic_context_parallel: bool = False
    """Let a pack be shared by 1, 2, 4, ... of the `context_parallel` ranks: by as few as hold it and keep the time of
    the ranks even. `context_parallel` is a power of two then. Loss and gradient do not change.

    Source: Megatron-LM, "hybrid context parallel".
    """
    expert_parallel: int = Field(default=1, gt=0)
    """Expert-parallel size (EP): ranks over which the experts are distributed."""
    expert_tensor_parallel: int = Field(default=1, gt=0)
    """Expert tensor-parallel size (ETP): ranks over which one expert is split."""
    distributed_optimizer: bool = True
    """Distribute optimizer states over the data-parallel ranks. Without a GPU it is ignored, and the log says so.

    Source: Megatron-LM, arXiv 2104.04473.
    """
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass. `selective` = the experts, or the feed-forward part of a dense
    model; `full` = every layer."""
    offload_activations: bool = False
    """With recompute=full: keep layer inputs in pinned host memory until their backward pass.

    Source: chosen here. At the width of 30B-A3B the two copies take an eighth of the time of a layer's matrix products,
    and 2 % of the layer's time at 100K tokens (at 55 GB/s; not measured).
    """
    aux_loss_coefficient: float = Field(default=0.0, ge=0)
    """Coefficient of the router's load-balancing loss; 0 in reinforcement learning."""
    skip_zero_gradients: bool = True
    """Leave out passes whose gradient is 0: sequences with advantage 0, the backward pass of clipped ones, and the
    scoring of the first mini-batch, whose training forward pass gives the same log-probs. All count in every
    denominator; loss and gradient do not change. Off where the objective requires every sequence (`gspo plan` says so).
    Source: chosen here."""
    micro_batch_tokens: int = Field(default=16384, gt=0)
    """Most tokens of one packed micro-batch on one data-parallel rank, summed over its CP ranks. A pack that fewer of
    them share has as many tokens a rank at most.

    Source: chosen here: fits one 80 GB GPU at the width of 30B-A3B.
    """
    head_chunk_tokens: int = Field(default=1024, gt=0)
    """Tokens for which the log-prob head holds logits at one time.

    Source: chosen here: 0.6 GB of float32 logits at a vocabulary of 151,936.
    """
    max_steps: int = Field(default=100, ge=0)
    """Rollout batches to train on; 0 = only evaluate the starting weights. Source: chosen here."""
    max_skipped: int = Field(default=4, ge=0)
    """Most consecutive updates skipped for a non-finite gradient; the next one ends the run. Source: chosen here."""
    megatron: MegatronMap = MegatronMap()
    """Arguments of Megatron's TransformerConfig, DistributedDataParallelConfig and OptimizerConfig, passed on as they
    are. `gspo plan RECIPE --explain-engines` shows what differs from Megatron's defaults."""
