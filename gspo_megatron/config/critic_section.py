"""The section `critic`: how the value head of `objective.advantage=gae` is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gspo_megatron.config.base import Section
from gspo_megatron.config.optimizer_section import OptimizerSection


class CriticSection(Section):
    """`critic`: a scalar head on the policy's final hidden states, trained beside the policy. It starts at 0."""

    trunk: Literal["shared", "detached"] = "shared"
    """shared: the critic's gradient goes on into the policy's layers, times objective.value_coefficient. detached: it
    ends at the head, so that the critic learns from the policy's features and never changes them. Source: PPO's paper
    (arXiv 1707.06347, section 5), whose loss of shared parameters adds both terms."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate of the head; null = optimizer.lr. It follows optimizer.schedule and optimizer.warmup_updates."""
    warmup_steps: int = Field(default=0, ge=0)
    """First steps in which only the head learns: the learning rate of every other weight is 0. They are a part of
    trainer.max_steps."""

    def learning_rates(self, optimizer: OptimizerSection, update: int, total: int, each: int) -> tuple[float, float]:
        """Return the learning rates of the policy and of the value head at an update.

        Args:
            optimizer: the schedule.
            update: number of the update, from 1; skipped ones count.
            total: updates of the whole run.
            each: updates of a step.
        """
        own = optimizer if self.lr is None else optimizer.model_copy(update={"lr": self.lr})
        policy = 0.0 if update <= self.warmup_steps * each else optimizer.learning_rate(update, total)
        return policy, own.learning_rate(update, total)
