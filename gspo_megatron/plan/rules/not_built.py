"""What the training loop does not do yet: asked for, it is refused by name."""

from __future__ import annotations

from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding


def not_built(recipe: Recipe) -> list[Finding]:
    """Errors for what `gspo plan` can plan with and the loop cannot run."""
    spec = recipe.objective.spec(recipe.rollout.max_answer_tokens)
    found = []
    if spec.replay == "sampler":
        found.append(
            Finding(
                "not-built", "error", "objective.replay",
                "sampler is asked for, but the servers' routes are not written to the sample store yet",
                "set objective.replay=trainer",
            )
        )  # fmt: skip
    return found
