"""The one rule for paths: `~` is the home directory, and a relative path is relative to where it is written.

A path in a recipe file is relative to that file, as `base:` is; a path on the command line is relative to the directory
in which the command was started. A checked recipe holds absolute paths only, so every process of a run, a resumed run
and the nodes of a cluster read the same files. `$NAME` is not expanded.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from gspo_megatron.config.field_rules import NULL_WORDS, options_of, section_of
from gspo_megatron.config.yaml_text import Scalar

LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes that Linux takes; what looks at a longer path raises in the middle of something else."""


class PathMark:
    """Marks the type of a key that holds a path, or the name of an object in a file."""


def absolute_path(text: str | Path, directory: Path | None = None) -> Path:
    """Return a path without `~`, and absolute.

    Args:
        text: as it was written. `./~a` is a file of that name.
        directory: what a relative path is relative to; null = where the command was started.

    Raises:
        ValueError: a home directory that is not known, no present directory, or a path that no file can have.
    """
    written = str(text)
    expanded = os.path.expanduser(written)
    if written.startswith("~") and expanded == written:
        raise ValueError(f"the home directory of {written.split('/')[0]} is not known; write the path without ~")
    try:
        made = str((directory or Path.cwd()).absolute() / expanded) if not os.path.isabs(expanded) else expanded
    except FileNotFoundError:
        raise ValueError(
            f"{written} is relative to a directory that was removed; change to another directory"
        ) from None
    if len(os.fsencode(made)) > LONGEST_PATH or any(len(os.fsencode(p)) > LONGEST_NAME for p in made.split("/")):
        raise ValueError(f"{written[:60]}... is longer than the name of a file can be; name another path")
    # `..` behind a link is not the directory that the text shows.
    collapsed = os.path.normpath(made)
    return Path(collapsed if os.path.realpath(collapsed) == os.path.realpath(made) else made)


def read_path(text: str) -> Path:
    """Read a path on the command line by the rule of the recipe's paths: the type of every such argument."""
    try:
        made = absolute_path(text)
        return made if text.startswith("~") else Path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def absolute_reference(text: str, directory: Path | None = None) -> str:
    """Return `file.py:NAME` with an absolute path; `package.module:NAME` and names without a colon stay.

    Raises:
        ValueError: as `absolute_path`.
    """
    place, colon, name = text.rpartition(":")
    return f"{absolute_path(place, directory)}:{name}" if colon and place.endswith(".py") else text


def _absolute(value: Any) -> Any:
    return absolute_path(value) if isinstance(value, str | Path) else value


RecipePath = Annotated[Path, BeforeValidator(_absolute), PathMark()]
"""Type of a key that holds a path."""
ObjectReference = Annotated[str, AfterValidator(absolute_reference), PathMark()]
"""Type of a key that may hold `file.py:NAME`."""


def short_path(path: Path) -> Path:
    """Return a path for people: relative to the present directory where it lies in it."""
    try:
        return path.relative_to(Path.cwd()) if path.is_absolute() else path
    except (ValueError, FileNotFoundError):
        return path


def place_paths(tree: Mapping[str, Any], model: type[BaseModel], directory: Path) -> dict[str, Any]:
    """Make the relative paths of a tree absolute. What is no path is left for the schema to refuse.

    Args:
        tree: texts and values of one file, or of an override.
        model: class of the section.
        directory: where the file lies, or where the command was started.
    """
    fields = model.model_fields
    return {name: _place(value, _annotation(fields[name]), directory) if name in fields else value
            for name, value in tree.items()}  # fmt: skip


def paths_of(section: BaseModel) -> dict[str, Path]:
    """Return every path that a checked recipe holds, by its dotted key; files of `file.py:NAME` included."""
    found: dict[str, Path] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found |= {f"{name}.{key}": path for key, path in paths_of(value).items()}
            continue
        for number, one in enumerate(value if isinstance(value, tuple) else (value,)):
            place = one if isinstance(one, Path) else _file_of(one) if holds_path(_annotation(field)) else None
            if place is not None:
                found[f"{name}.{number}" if isinstance(value, tuple) else name] = place
    return found


def holds_path(annotation: Any) -> bool:
    """Whether a type, or a part of it, is `RecipePath` or `ObjectReference`."""
    return _is_marked(annotation) or any(holds_path(part) for part in get_args(annotation))


def _annotation(field: FieldInfo) -> Any:
    """The type of a field as it was written: pydantic keeps what stood around it apart."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _is_marked(annotation: Any) -> bool:
    return get_origin(annotation) is Annotated and any(isinstance(part, PathMark) for part in get_args(annotation))


def _place(value: Any, annotation: Any, directory: Path) -> Any:
    if isinstance(value, dict):
        section = section_of(annotation)
        return value if section is None else place_paths(value, section, directory)
    options = options_of(annotation)[0]
    if isinstance(value, list):
        kinds = [get_args(option)[0] for option in options if get_origin(option) is tuple]
        return [_place(item, kinds[0], directory) for item in value] if kinds else value
    if not isinstance(value, str) or not holds_path(annotation) or value == "" or value.startswith("~"):
        return value
    if isinstance(value, Scalar) and (value.cut or (value.plain and value in NULL_WORDS)):
        return value  # refused, or null
    made = str(directory.absolute() / value) if Path in options else absolute_reference(value, directory)
    return Scalar(made, value.plain, value.where, value.cut) if isinstance(value, Scalar) else made


def _file_of(reference: Any) -> Path | None:
    place = reference.rpartition(":")[0] if isinstance(reference, str) else ""
    return Path(place) if place.endswith(".py") else None
