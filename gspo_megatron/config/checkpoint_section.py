"""The section `checkpoint`."""

from __future__ import annotations

from pydantic import Field

from gspo_megatron.config.base import Section


class CheckpointSection(Section):
    """`checkpoint`: the states that a run can resume from."""

    every: int = Field(default=10, ge=0)
    """Steps between checkpoints; 0 = only when the job receives SIGUSR1.

    Source: chosen here: about an hour of the shipped recipes.
    """
    keep: int = Field(default=2, gt=0)
    """Complete checkpoints to keep. Source: chosen here: the newest, and one more in case its files are damaged."""
    export_every: int = Field(default=0, ge=0)
    """Steps between exports as a Hugging Face directory, all of them kept; 0 = only at the end. Source: chosen here."""
