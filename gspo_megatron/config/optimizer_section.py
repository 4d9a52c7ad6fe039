"""The section `optimizer`: AdamW and its learning rate."""

from __future__ import annotations

from pydantic import Field

from gspo_megatron.config.base import Section


class OptimizerSection(Section):
    """`optimizer`: AdamW of the reinforcement learning phase."""

    lr: float = Field(default=1e-6, ge=0)
    """Learning rate after warm-up, constant from there. 0 switches the updates off (a control run).

    Source: public Qwen3 recipes.
    """
    warmup_updates: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment. Source: usual for large language models."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon. Source: Adam, arXiv 1412.6980."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of matrices. Weights of norms are not decayed."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest global gradient norm. Source: usual for transformers."""
