"""Settings that the training loop does not support yet. They are refused by name."""

from __future__ import annotations

from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding


def not_built(recipe: Recipe) -> list[Finding]:
    """Return errors for settings that `gspo plan` can plan and the training loop cannot run."""
    spec = recipe.objective.spec(recipe.rollout.max_answer_tokens)
    found = []
    if spec.replay == "sampler":
        found.append(
            Finding(
                "not-built", "error", "objective.replay",
                "sampler is not supported yet: the servers' routes are not written to the sample store",
                "set objective.replay=trainer",
            )
        )  # fmt: skip
    return found
