"""The section `run`: what a run is called and where it writes."""

from __future__ import annotations

from pydantic import Field, field_validator

from gspo_megatron.config.base import Section
from gspo_megatron.config.recipe_paths import RecipePath


class RunSection(Section):
    """`run`: name, seed and directory of the run."""

    name: str = "run"
    """Name of the run, used in its directory and in titles: 1 to 100 printable bytes, without `/`
    and no dot in front."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation, data order and sampling. Runs with one seed see the same prompts in the same order."""
    directory: RecipePath | None = None
    """Directory that the run writes to; null = runs/<name>-<date> where the command was started."""

    @field_validator("name")
    @classmethod
    def name_is_one_part_of_a_path(cls, value: str) -> str:
        hidden = value.startswith(".") or not value.strip()
        if hidden or "/" in value or len(value.encode()) > 100 or not value.isprintable():
            raise ValueError(
                f"{value[:60]!r} cannot name a directory; use 1 to 100 printable bytes, without / and no dot in front"
            )
        return value
