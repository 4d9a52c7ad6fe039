"""The section `optimizer`: AdamW and its learning rate."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from gspo_megatron.config.base import Section

DecayRate = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a moment; Adam divides by 1 - rate^t."""


class OptimizerSection(Section):
    """`optimizer`: AdamW of the reinforcement learning phase."""

    lr: float = Field(default=1e-6, ge=0)
    """Learning rate after warm-up. 0 switches the updates off (a control run).

    Source: public Qwen3 recipes.
    """
    warmup_updates: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after warm-up: constant, or falling from lr to final_fraction * lr at the last update of the run,
    trainer.max_steps * batch.updates. A run that is resumed with another trainer.max_steps follows the schedule of the
    new length from its next update on. Source: public Qwen3 recipes.
    """
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """cosine, linear: learning rate of the last update as a share of lr."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment. Source: usual for large language models."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon. Source: Adam, arXiv 1412.6980."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of matrices. Weights of norms are not decayed."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest global gradient norm. Source: usual for transformers."""

    def learning_rate(self, update: int, total: int) -> float:
        """Return the learning rate of an update. It depends on nothing but the recipe and these numbers.

        Args:
            update: number of the update, from 1; skipped ones count.
            total: updates of the whole run.
        """
        warm = self.lr * min(1.0, update / max(1, self.warmup_updates))
        if self.schedule == "constant" or update <= self.warmup_updates:
            return warm
        done = min(1.0, (update - self.warmup_updates) / max(1, total - self.warmup_updates))
        left = 1.0 - done if self.schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2
        return warm * (self.final_fraction + (1.0 - self.final_fraction) * left)

    def describe(self, total: int) -> str:
        """Describe the learning rate of a run of `total` updates in one line."""
        warm = f"warm-up over {self.warmup_updates} updates to " if self.warmup_updates else ""
        if self.schedule == "constant":
            return f"{warm}{self.lr:g}, constant, {total} updates"
        last = self.learning_rate(total, total)
        return f"{warm}{self.lr:g}, then {self.schedule} to {last:g} at update {total}"
