"""What a model family is: keys, names, shapes, layouts. Imports no torch.

`load_recipe` is how every entry point reads a recipe: its typed architecture is then in `recipe.arch`.
"""

from gspo_megatron.models.registry import architecture_of
from gspo_megatron.models.resolution import (
    config_findings,
    load_recipe,
    load_resolved,
    parse_recipe,
    read_architecture,
    resolve,
)

__all__ = [
    "architecture_of",
    "config_findings",
    "load_recipe",
    "load_resolved",
    "parse_recipe",
    "read_architecture",
    "resolve",
]
