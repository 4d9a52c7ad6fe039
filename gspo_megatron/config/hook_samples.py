"""What `gspo check HOOK RECIPE` tries a user's object with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Problem


@dataclass(frozen=True, slots=True)
class Samples:
    """A recipe and its data."""

    recipe: Recipe
    """The recipe."""
    draw: Callable[[int], Sequence[Problem]]
    """Returns so many problems of its training data; fewer where there are fewer. Raises RecipeError."""
