"""`recipe.resolved.yaml`: the complete recipe of a run as plain YAML, which is read back without interpolation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from gspo_megatron.config.schema import Recipe

# What no reader of YAML takes for anything but text.
_WORD = re.compile(r"[A-Za-z/][A-Za-z0-9_/.-]*")
_PRINTABLE = re.compile(r"[\x20-\x7e]*")


class _Dumper(yaml.SafeDumper):
    """Quotes every text that might be read as something else; escapes by number, save line feeds."""

    ESCAPE_REPLACEMENTS = {'"': '"', "\\": "\\", "\n": "n"}  # noqa: RUF012  overrides PyYAML's table of the same type

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    node = dumper.represent_str(text)
    if not _WORD.fullmatch(text):
        node.style = "'" if _PRINTABLE.fullmatch(text) else '"'
    return node


_Dumper.add_representer(str, _represent_text)


def save_resolved(recipe: Recipe, path: Path) -> None:
    """Write the complete recipe, as it will be run."""
    tree = recipe.model_dump(mode="json")
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    path.write_text(text, encoding="utf-8")
