"""Values of a recipe by their dotted keys."""

from __future__ import annotations

from typing import Any

from gspo_megatron.config import Recipe


def value_of(recipe: Recipe, key: str) -> Any:
    """Return the value of a dotted key, entries of mappings included."""
    found: Any = recipe
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found
