"""Forward passes that a step costs, a sampled token: which passes a response is in, counted by FLOPs.

Scoring is 1, a training pass forward, recomputation and backward: 1 + r + 2, r = the share of a forward pass that is
computed again. A response with advantage 0 is in none, the first mini-batch is not scored, a clipped response goes
forward only.
"""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.config.schema import Recipe

BACKWARD = 2.0
"""FLOPs of a backward pass over those of a forward pass."""


@dataclass(frozen=True, slots=True)
class Passes:
    """What is assumed of a rollout batch, shares by FLOPs."""

    updates: int
    """Mini-batches."""
    live: float = 1.0
    """Share of the responses that are in the passes: those with an advantage."""
    clipped: float = 0.0
    """Share of these, in mini-batches after the first, that take no backward pass."""
    recomputed: float = 1.0
    """Share of a forward pass that is computed again: 1 with `trainer.recompute=full`."""
    scores_first: bool = True
    """Whether the first mini-batch is scored. Its check, one micro-batch a rank, is not counted, nor is the same
    micro-batch once more where the sampler's routes are replayed."""
    scores_later: bool = True
    """Whether the others are: not with `objective.ratio_reference=sampler`."""

    @property
    def scoring(self) -> float:
        """Forward-equivalents of the old log-probs."""
        later = self.updates - 1
        return self.live * (self.scores_first + later * self.scores_later) / self.updates

    @property
    def training(self) -> float:
        """Forward-equivalents of the updates."""
        back = self.recomputed + BACKWARD
        later = self.updates - 1
        return self.live * ((1 + back) + later * (1 + back * (1 - self.clipped))) / self.updates

    @property
    def total(self) -> float:
        """Their sum."""
        return self.scoring + self.training


def passes_of(recipe: Recipe, every: float, live: float, clipped: float) -> Passes:
    """Return the passes of a recipe that leaves out those whose gradient is 0.

    Args:
        recipe: of the run, without a reference policy.
        every: forward-equivalents with every response in every pass: scoring, forward, backward, what is repeated.
        live: share of the responses with an advantage.
        clipped: share of these that are clipped after the first mini-batch. It counts where single sequences are left
            out: without pipeline stages, with full recomputation.
    """
    trainer = recipe.trainer
    narrows = recipe.skips_clipped and trainer.pipeline_parallel == 1 and trainer.recompute == "full"
    return Passes(
        recipe.batch.updates,
        live,
        clipped if narrows else 0.0,
        every - BACKWARD - 2,
        scores_first=False,
        scores_later=recipe.scores_old_policy,
    )
