"""What the training loop does not do yet: asked for, it is refused by name."""

from __future__ import annotations

from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding


def not_built(recipe: Recipe) -> list[Finding]:
    """Errors for the axes that `gspo plan` can plan with and the loop cannot run."""
    spec = recipe.objective.spec(recipe.rollout.max_answer_tokens)
    asked = {
        "objective.kl": (spec.kl, "none", "no pass with the reference policy is made"),
        "objective.group_filter": (spec.group_filter, "none", "groups of equal rewards are not sampled anew"),
        "objective.replay": (spec.replay, "off", "routes are neither recorded nor replayed"),
    }
    return [
        Finding("not-built", "error", key, f"{value} is asked for, but {reason} yet", f"set {key}={neutral}")
        for key, (value, neutral, reason) in asked.items()
        if value != neutral
    ]
