"""What `gspo check HOOK RECIPE` tries a user's object with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Problem


@dataclass(frozen=True, slots=True)
class Samples:
    """A recipe and its data."""

    recipe: Recipe
    """The recipe."""
    draw: Callable[[int], Sequence[Problem]]
    """Returns so many problems of its training data; fewer where there are fewer. Raises RecipeError."""


class NotedLine(dict[str, Any]):
    """A line of data that notes which fields a user's object looked for and did not find."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(copy.deepcopy(dict(fields)))
        self.missing: list[str] = []

    def __missing__(self, name: str) -> Any:
        self.missing.append(name)
        raise KeyError(name)
