"""`gspo plan --explain KEY`: the description of a recipe key, read from the schema."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gspo_megatron.config.refusal import key_text, refuse
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.registry import architecture_class
from gspo_megatron.plan.units import value_text


def explain(key: str, recipe: Recipe | None = None) -> str:
    """Describe a dotted key: meaning, type, default, bounds, and its value in a recipe. A section lists its keys.

    Raises:
        RecipeError: the key does not exist. The fix names the closest one.
    """
    model: type[BaseModel] = Recipe
    value: Any = recipe
    parts = key.split(".")
    for place, part in enumerate(parts):
        if part not in model.model_fields:
            raise _unknown(key)
        field = model.model_fields[part]
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
        inner = _section_at(parts[: place + 1], field)
        if place == len(parts) - 1:
            return _section_text(key, inner) if inner else _field_text(key, field, value, recipe is not None)
        if inner is None:
            raise _unknown(key)
        model = inner
    raise _unknown(key)


def all_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the recipe, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = _section_at([*prefix.split(".")[:-1], name], field)
        if inner is not None:
            yield from all_keys(inner, f"{prefix}{name}.")


def _unknown(key: str) -> Exception:
    known = list(all_keys())
    close = difflib.get_close_matches(key, known, n=1) or [k for k in known if k.endswith("." + key.split(".")[-1])]
    fix = f"did you mean {close[0]}?" if close else "gspo plan --explain trainer lists the keys of a section"
    return refuse("unknown-key", key_text([key]), "is not a key of the recipe", fix)


def _section_at(path: list[str], field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds; the keys of an architecture are those of the default family."""
    return architecture_class() if path == ["model", "architecture"] else _section(field.annotation)


def _section(annotation: Any) -> type[BaseModel] | None:
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _section_text(key: str, model: type[BaseModel]) -> str:
    lines = [f"{key}: {_summary(model)}"]
    width = max(len(name) for name in model.model_fields)
    for name, field in model.model_fields.items():
        meaning = " ".join((field.description or "").split()).partition(" Source: ")[0]
        lines.append(f"  {name:<{width}}  {meaning or _section_line(field)}")
    return "\n".join(lines)


def _section_line(field: FieldInfo) -> str:
    inner = _section(field.annotation)
    return _summary(inner) if inner else ""


def _summary(model: type[BaseModel]) -> str:
    """The docstring of a section on one line."""
    return " ".join((model.__doc__ or "").split())


def _field_text(key: str, field: FieldInfo, value: Any, given: bool) -> str:
    meaning, _, source = " ".join((field.description or "no description").split()).partition(" Source: ")
    lines = [key, f"  {meaning}"]
    lines.append(f"  type      {_type_words(field.annotation)}{_bounds(field)}")
    default = None if field.is_required() else value_text(field.get_default(call_default_factory=True))
    lines.append(f"  default   {default or 'none: it must be set'}")
    if source:
        lines.append(f"  from      {source.rstrip('.')}")
    if given:
        lines.append(f"  here      {value_text(value)}")
    return "\n".join(lines)


def _type_words(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type_words(get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(str(option) for option in get_args(annotation))
    if origin in (Union, UnionType):
        return " | ".join(_type_words(option) for option in get_args(annotation))
    if annotation is type(None):
        return "null"
    if origin is not None:
        inner = ", ".join(_type_words(option) for option in get_args(annotation) if option is not Ellipsis)
        return f"{origin.__name__} of {inner}" if inner else origin.__name__
    return {"int": "whole number", "float": "number", "str": "text", "bool": "true | false"}.get(
        getattr(annotation, "__name__", str(annotation)), getattr(annotation, "__name__", str(annotation))
    )


def _bounds(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return f", {' and '.join(bounds)}" if bounds else ""
