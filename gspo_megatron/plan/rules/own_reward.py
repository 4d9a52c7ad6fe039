"""Rule of the reward: whether a user's own is one."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.hooks import load_hook
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding


def findings(recipe: Recipe) -> Iterator[Finding]:
    """Load the reward that a recipe names and check its form."""
    if recipe.reward.is_own:
        try:
            load_hook("reward", recipe.reward.name)
        except RecipeError as error:
            yield from error.findings
