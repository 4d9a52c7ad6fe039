"""Which text a key of the recipe takes, by the key's type: one table for overrides, files and Python values.

| type | text |
|---|---|
| text, path | the text as it is; control characters are refused; a path is one line and not empty |
| whole number | decimal digits with an optional sign; `010` is ten |
| number | decimal digits with an optional point, sign and exponent; finite |
| true or false | `true`, `false` |
| list, mapping | YAML; a value follows the rule of its type |
| anything (`data.options`) | `null`, `true`, `false` and numbers by these rules, else text |

The word `null`, unquoted, is null where the key may be null. `${x}`, `~` and `#` have no meaning in a text;
`recipe_paths` says what `~` means in a path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from gspo_megatron.config.refusal import key_text, quote
from gspo_megatron.config.yaml_text import NOT_ONE_LINE, Scalar
from gspo_megatron.types import Finding

_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
# Line feed and tab are text.
_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_MOST_DIGITS = 18
_NULL_LIKE = ("", "~", "Null", "NULL")
NULL_WORDS = ("null", *_NULL_LIKE)
"""Plain scalars that are null, or that are refused because YAML 1.1 takes them for it."""
_WRONG = object()
"""Stands in a tree where a value was refused."""


def _whole(text: str) -> int:
    if not _WHOLE.fullmatch(text) or len(text.lstrip("+-0")) > _MOST_DIGITS:
        raise ValueError
    return int(text)


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError
    value = float(text)
    vanished = value == 0 and re.search("[1-9]", re.split("[eE]", text)[0])
    if vanished or not math.isfinite(value):
        raise ValueError
    return value


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


class Rule(NamedTuple):
    """How the text of one type is read."""

    read: Callable[[str], Any]
    """Text to value; raises ValueError."""
    words: str
    fix: str


RULES: dict[type, Rule] = {
    int: Rule(_whole, f"a whole number of at most {_MOST_DIGITS} decimal digits", "write digits, e.g. 10"),
    float: Rule(_number, "a finite decimal number", "write e.g. 0.5 or 1e-6"),
    bool: Rule(_truth, "true or false", "write true or false"),
}


def options_of(annotation: Any) -> tuple[tuple[Any, ...], bool]:
    """Return the types that a key may have without null, and whether it may be null."""
    annotation = _bare(annotation)
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    rest = tuple(_bare(option) for option in options if option is not type(None))
    return rest, len(rest) < len(options) or Any in rest


def _bare(annotation: Any) -> Any:
    """The type without what a recipe section says about it, e.g. that it is a path."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a key holds; None where it holds a value."""
    options = options_of(annotation)[0]
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def is_text(annotation: Any) -> bool:
    """Tell whether a key takes any text: text and paths."""
    return all(option in (str, Path) for option in options_of(annotation)[0])


def read_section(
    tree: Mapping[str, Any], model: type[BaseModel], prefix: tuple[str, ...] = ()
) -> tuple[dict[str, Any], list[Finding]]:
    """Turn the texts of a tree into values by the types of a section, and report what does not follow its rule.

    Args:
        tree: `Scalar`s as they were read, or Python values.
        model: class of the section.
        prefix: path of the section in the recipe.
    """
    reader = _Reader()
    return reader.section(tree, model, prefix), reader.faults


class _Reader:
    """Reads one tree and keeps its faults."""

    def __init__(self) -> None:
        self.faults: list[Finding] = []

    def fault(self, key: tuple[str, ...], value: Any, message: str, fix: str) -> Any:
        where = getattr(value, "where", "")
        shown = quote(str(value) if isinstance(value, Scalar) else value) + (f" ({where})" if where else "")
        self.faults.append(Finding("wrong-value", "error", key_text(key), f"{shown} {message}", fix))
        return _WRONG

    def section(self, tree: Mapping[str, Any], model: type[BaseModel], key: tuple[str, ...]) -> dict[str, Any]:
        fields = {name: field.annotation for name, field in model.model_fields.items()}
        # The schema names unknown keys; their values only lose their marks.
        return {name: self.value(value, fields.get(name, Any), (*key, name)) for name, value in tree.items()}

    def value(self, value: Any, annotation: Any, key: tuple[str, ...]) -> Any:
        options, _ = options_of(annotation)
        if isinstance(value, Scalar) and value.plain:
            if value == "null":
                return None
            if value in _NULL_LIKE:
                return self.no_value(value, key)
        if isinstance(value, Mapping):
            return self.mapping(value, options, key)
        if isinstance(value, list | tuple):
            return self.sequence(value, options, key)
        if isinstance(value, bool) and not ({bool, Any} & set(options)):
            return self.fault(key, value, "is true or false where another kind of value belongs", "write that")
        if (type(value) is int and options == (bool,)) or (type(value) is float and options == (int,)):
            return self.fault(key, value, f"is not {RULES[options[0]].words}", RULES[options[0]].fix)
        if type(value) is int and abs(value) >= 10**_MOST_DIGITS:
            return self.fault(key, "an integer", f"is not {RULES[int].words}", "take a smaller number")
        if isinstance(value, float) and not math.isfinite(value):
            return self.fault(key, value, f"is not {RULES[float].words}", RULES[float].fix)
        return self.text(value, options, key) if isinstance(value, str) else value

    def no_value(self, value: Scalar, key: tuple[str, ...]) -> Any:
        if value.cut:
            return self.fault(key, value, "is followed by #, which starts a comment", "write the text in single quotes")
        return self.fault(key, value, "is no value", "write null, or quote it where it is text")

    def mapping(self, value: Mapping[str, Any], options: tuple[Any, ...], key: tuple[str, ...]) -> Any:
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if section is not None:
            return self.section(value, section, key)
        inner = next((get_args(option)[1] for option in options if get_origin(option) is dict), None)
        if inner is None and Any not in options:
            return self.fault(key, _plain(value), "is a mapping where a value belongs", "write the value alone")
        inner = Any if inner is None else inner
        wrong = next((name for name in value if NOT_ONE_LINE.search(str(name))), None)
        if wrong is not None:
            return self.fault(key, str(wrong), "is a key with control characters", "leave them out")
        return {name: self.value(item, inner, (*key, str(name))) for name, item in value.items()}

    def sequence(self, value: list[Any] | tuple[Any, ...], options: tuple[Any, ...], key: tuple[str, ...]) -> Any:
        inner = next((get_args(option) for option in options if get_origin(option) is tuple), None)
        if inner is None and Any not in options:
            return self.fault(key, _plain(value), "is a list where none belongs", "write the value without brackets")
        kinds = [Any if not inner else inner[0] if inner[-1] is ... else inner[min(i, len(inner) - 1)]
                 for i in range(len(value))]  # fmt: skip
        return [self.value(item, kind, (*key, str(i))) for i, (item, kind) in enumerate(zip(value, kinds, strict=True))]

    def text(self, value: str, options: tuple[Any, ...], key: tuple[str, ...]) -> Any:
        choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
        if choices:
            return self.choice(value, choices, key)
        if Any in options or any(get_origin(option) is tuple for option in options):
            return self.free_text(value, options, key)
        if str not in options and Path not in options:
            return self.typed(value, options, key)
        # A union of numbers and text takes the first that fits, unless it is quoted.
        if isinstance(value, Scalar) and value.plain:
            for kind in (kind for kind in RULES if kind in options):
                try:
                    return RULES[kind].read(value)
                except ValueError:
                    continue
        return self.checked(value, key, path=Path in options)

    def choice(self, value: str, choices: list[Any], key: tuple[str, ...]) -> Any:
        """One of a few words or numbers; another word is the schema's to refuse, with the list."""
        if all(isinstance(choice, int) for choice in choices):
            return self.typed(value, (int,), key)
        return self.checked(value, key)

    def typed(self, value: str, options: tuple[Any, ...], key: tuple[str, ...]) -> Any:
        kinds = [kind for kind in RULES if kind in options]
        for kind in kinds:
            try:
                return RULES[kind].read(value)
            except ValueError:
                continue
        if not kinds:
            return self.checked(value, key)
        return self.fault(key, value, f"is not {RULES[kinds[-1]].words}", RULES[kinds[-1]].fix)

    def free_text(self, value: str, options: tuple[Any, ...], key: tuple[str, ...]) -> Any:
        if Any in options and isinstance(value, Scalar) and value.plain:
            for kind, form in ((int, _WHOLE), (float, _NUMBER)):
                if form.fullmatch(value):
                    return self.typed(value, (kind,), key)
            if value in ("true", "false"):
                return value == "true"
        return self.checked(value, key)

    def checked(self, value: str, key: tuple[str, ...], path: bool = False) -> Any:
        found = (NOT_ONE_LINE if path else _NOT_TEXT).search(value)
        if found:
            fix = "leave it out; in a file, write text with backslashes in single quotes"
            return self.fault(key, value, f"holds the character U+{ord(found[0]):04X}", fix)
        if path and not value:
            return self.fault(key, value, "is an empty path", "name a path; . is the current directory")
        if isinstance(value, Scalar) and value.cut:
            fix = "write it in single quotes if # belongs to it; else put a blank behind #"
            return self.fault(key, value, "is cut at #, which starts a comment", fix)
        return str(value)


def _plain(value: Any) -> Any:
    """A tree without the marks of its scalars, for a message."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Scalar) else value
