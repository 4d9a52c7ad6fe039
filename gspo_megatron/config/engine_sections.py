"""The sections `trainer.megatron` and `rollout.vllm`: arguments that are passed on to the libraries.

Keys, types and choices are those of the pinned libraries (`engine_signatures.json`), so a wrong one is a fault of the
recipe, like any other key's.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, create_model, model_serializer
from pydantic.functional_serializers import SerializerFunctionWrapHandler

from gspo_megatron.config.base import Section
from gspo_megatron.config.engine_keys import MEGATRON_KEYS, NARROWED, VLLM_KEYS, refused_keys

SIGNATURES: dict[str, dict[str, dict[str, dict[str, Any]]]] = json.loads(
    (Path(__file__).parent / "engine_signatures.json").read_text(encoding="utf-8")
)
"""Engine -> class -> argument -> its form: type in words, choices, fields of a mapping, default."""
_TYPES: dict[str, Any] = {"bool": bool, "text": str, "list of text": tuple[str, ...], "mapping": dict[str, Any]}
_NUMBERS: dict[str, type[int | float]] = {"int": int, "float": float, "list of int": int}
_SIZES = (
    "bucket_size", "block_size", "moe_flex_dispatcher_num_sms", "cudagraph_capture_sizes",
    "hierarchical_context_parallel_sizes",
)  # fmt: skip
"""Arguments whose numbers are 1 or more, and of which a list has one. Both libraries fail on less, but not until nodes
are allotted, and the plan divides by some."""


class EngineMap(Section):
    """Arguments of one library; those that are not given stay as this package chooses them."""

    refused: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """What is wrong with, and what to do instead of, arguments that are none of a recipe."""

    def given(self) -> dict[str, Any]:
        """The arguments that the recipe gives."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    @model_serializer(mode="wrap")
    def leave_out_what_is_not_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


def arguments_of(engine: str) -> dict[str, dict[str, Any]]:
    """Every argument of an engine; one of several classes has the form of the first."""
    merged: dict[str, dict[str, Any]] = {}
    for arguments in SIGNATURES[engine].values():
        merged = arguments | merged
    return merged


def _annotation(name: str, form: Mapping[str, Any], own: Collection[str]) -> Any:
    choices = NARROWED.get(name, tuple(form.get("choices", ())))
    if choices:
        one: Any = Literal[tuple(choices)]
        return tuple[one, ...] if form["type"].startswith("list") else one
    if "fields" in form:
        return Annotated[dict[str, Any], AfterValidator(_holds_only(form["fields"], own))]
    if form["type"] not in _NUMBERS:
        return _TYPES[form["type"]]
    default = form["default"] if isinstance(form["default"], int | float) else 0
    # None has a meaning below 0, but where that is its default.
    number: Any = Annotated[_NUMBERS[form["type"]], Field(ge=1 if name in _SIZES else min(0, default))]
    if form["type"].startswith("list"):
        return Annotated[tuple[number, ...], Field(min_length=int(name in _SIZES))]
    return number


def _holds_only(names: list[str], own: Collection[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Check the fields of a mapping. What is an argument of its own (`own`) has one place: rules and plan read that."""

    def check(values: dict[str, Any]) -> dict[str, Any]:
        if twice := next((name for name in values if name in names and name in own), None):
            raise ValueError(f"{twice!r} is an argument of its own; move it there, out of this mapping")
        unknown = next((name for name in values if name not in names), None)
        if unknown is not None:
            close = difflib.get_close_matches(unknown[:100], names, n=1)
            raise ValueError(
                f"{unknown!r} is none of its fields; "
                + (f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}")
            )
        return values

    return check


def _make(engine: str, keys: Mapping[str, str], title: str) -> type[EngineMap]:
    known = arguments_of(engine)
    fields: dict[str, Any] = {}
    for name in sorted(keys):
        default = json.dumps(known[name]["default"])
        about = f"{keys[name]} null = as this package chooses; the library's own default: {default}. Source: {engine}."
        fields[name] = (_annotation(name, known[name], known) | None, Field(default=None, description=about))
    made = create_model(title, __base__=EngineMap, __module__=__name__, __doc__=EngineMap.__doc__, **fields)
    made.refused = refused_keys(engine, known)
    return made


if TYPE_CHECKING:
    MegatronMap = VllmMap = EngineMap
else:
    MegatronMap = _make("megatron", MEGATRON_KEYS, "MegatronMap")
    VllmMap = _make("vllm", VLLM_KEYS, "VllmMap")
