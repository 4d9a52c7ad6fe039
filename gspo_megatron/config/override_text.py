"""`section.key=value` from the command line."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from gspo_megatron.config.field_rules import is_text, options_of, section_of
from gspo_megatron.config.refusal import quote, refuse
from gspo_megatron.config.schema import Recipe
from gspo_megatron.config.yaml_text import Scalar, read_yaml_value

_DEEPEST = 16


def read_override(item: str) -> dict[str, Any]:
    """Turn an override into a tree with one leaf. Raises RecipeError: no key, no sign, or a value that is not YAML.

    Text and paths are what follows the first `=`, exactly. Lists and mappings are YAML.
    """
    key, sign, text = item.partition("=")
    parts = key.split(".")
    formed = sign and all(parts) and key.isprintable() and key == key.strip()
    formed = formed and not key.startswith("-") and len(parts) <= _DEEPEST
    if not formed:
        name = item if item.isprintable() and 0 < len(item) <= 60 else quote(item)
        raise refuse("override-form", name, "is not of the form section.key=value", "write e.g. trainer.max_steps=10")
    parts, annotation = _find(parts)
    tree = _read_value(text, annotation, tuple(parts))
    for part in reversed(parts):
        tree = {part: tree}
    return tree


def _find(parts: list[str]) -> tuple[list[str], Any]:
    """Return the keys down to the value, and its type; None where the recipe has no such key."""
    annotation: Any = Recipe
    for place, part in enumerate(parts):
        section = section_of(annotation)
        mapping = next((option for option in options_of(annotation)[0] if get_origin(option) is dict), None)
        if section is not None:
            field = section.model_fields.get(part)
            annotation = field.annotation if field else None
        elif mapping is not None and get_args(mapping)[1] is not Any:
            # The names in a mapping of values are the user's own, and may hold dots.
            return [*parts[:place], ".".join(parts[place:])], get_args(mapping)[1]
        else:
            annotation = Any if mapping is not None or annotation is Any else None
    return parts, annotation


def _read_value(text: str, annotation: Any, parts: tuple[str, ...]) -> Any:
    if annotation is None:
        return text
    if is_text(annotation):
        return None if text == "null" and options_of(annotation)[1] else text
    holds_values = annotation is Any or section_of(annotation) or _is_container(annotation)
    if holds_values and text.lstrip(" ")[:1] in ("[", "{"):
        return read_yaml_value(text, parts)
    return Scalar(text)


def _is_container(annotation: Any) -> bool:
    return any(get_origin(option) in (tuple, dict) for option in options_of(annotation)[0])
