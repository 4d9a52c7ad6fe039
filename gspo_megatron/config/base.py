"""The base of every recipe section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a recipe. It is frozen and typed, and an unknown key is an error.

    The docstring under a field is its description: `gspo plan --explain` prints it and schema.json holds it.
    """

    # JSON has no infinity: the resolved recipe would read it back as null.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
