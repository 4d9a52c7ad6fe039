"""The base of every recipe section."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe: frozen, typed, unknown keys are errors, every field has a description with its unit."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    if TYPE_CHECKING:
        # A frozen model is hashable; pydantic makes the method where no type checker sees it.
        def __hash__(self) -> int: ...
