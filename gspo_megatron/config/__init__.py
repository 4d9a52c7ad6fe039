"""The typed recipe and how it is read. Imports without torch, in well under a second."""

from gspo_megatron.config.loading import RecipeError, save_resolved
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe

__all__ = ["Architecture", "Recipe", "RecipeError", "save_resolved"]
