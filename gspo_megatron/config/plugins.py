"""Load a user's object by the name `file.py:NAME` or `package.module:NAME`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from gspo_megatron.config.secret_text import hidden_output, hide_secrets

_LONGEST = 300
OURS = f"{__name__.partition('.')[0]}."
"""Modules of the package."""


def load_object(reference: str) -> Any:
    """Return the object at `path/to/file.py:NAME` or `package.module:NAME`.

    A file may import the files beside it. Installed packages and the standard library come before those, so that a
    file of the user's named `random.py` changes nothing else.

    Raises:
        ValueError: the file, the module or the name does not exist, or it cannot be imported.
    """
    place, _, name = reference.rpartition(":")
    if not (place and name):
        raise ValueError("it names no object; write file.py:NAME or package.module:NAME")
    # What a module prints while it is imported is no part of what a command prints.
    with contextlib.redirect_stdout(sys.stderr):
        module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
        with _as_sentence(place):  # a module may have a __getattr__ of its own
            if hasattr(module, name):
                return getattr(module, name)
    raise ValueError(_no_such_name(module, place, name))


def describe_fault(error: BaseException, file: str = "") -> str:
    """Return what was raised as one line without secrets: `KeyError: 'x' (line 3)`.

    Args:
        error: what was raised.
        file: path of the user's file: its innermost line in the stack is named.
    """
    text = " ".join(error_text(error).split()).removesuffix(": ")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if file and frame.filename == file]
    place = f" (line {lines[-1]})" if lines else ""
    text = hide_secrets(text)
    return (text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}...") + place


def error_text(error: BaseException) -> str:
    """Type and text of an exception, `KeyError: 'x'`; a user's own may raise where its text is made."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as fault:
        return f"{type(error).__name__}: (its text raises {type(fault).__name__})"


def source_of(found: Any) -> str:
    """The file in which an object was defined; empty where there is none."""
    made_by = found if inspect.isroutine(found) or inspect.isclass(found) else type(found)
    try:
        return inspect.getfile(made_by)
    except (TypeError, OSError):
        return ""


class _NotLoaded(ValueError):
    """A fault that is a sentence already."""


def _load_module(place: str) -> ModuleType:
    if place in sys.modules:
        return sys.modules[place]
    with contextlib.nullcontext() if place.startswith(OURS) else hidden_output(), _as_sentence(place):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if not (error.name and f"{place}.".startswith(f"{error.name}.")):
                raise  # it is found, and imports another one that is not
            beside = _file_beside(place)
            fix = f"write {beside}:NAME" if os.path.isfile(beside) else "put it on the Python path, or name a file"
            raise _NotLoaded(f"module {error.name} of {place} cannot be found; {fix}") from None


def _load_file(path: Path) -> ModuleType:
    resolved = Path(os.path.expanduser(path)).resolve()
    # One module per file: a trust rule and a preset of one file share their globals, however often they are loaded.
    name = f"gspo_plugin_{resolved.stem}_{abs(hash(resolved)):x}"
    if name in sys.modules:
        return sys.modules[name]
    if not os.path.isfile(resolved):  # also of names that are too long for a file
        raise ValueError(f"{path.absolute()} does not exist; give the path of a Python file (config/README.md, Paths)")
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(resolved.parent) not in sys.path:
        sys.path.append(str(resolved.parent))
    try:
        with hidden_output(), _as_sentence(str(path), str(resolved)):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _as_sentence(place: str, file: str = "") -> Iterator[None]:
    """Turn whatever a user's code raises at import into ValueError, the end of a script included."""
    try:
        yield
    except _NotLoaded:
        raise
    except SystemExit as error:
        fault = f"{place} cannot be imported: it ends Python (SystemExit: {error})"
        raise ValueError(f"{fault}; put what runs as a script under if __name__ == '__main__'") from None
    # The module is the user's own and may raise anything; a name like `.a` is a TypeError.
    except Exception as error:
        fault = describe_fault(error, file)
        raise ValueError(f"{place} cannot be imported ({fault}); correct it, then import it alone") from error


def _no_such_name(module: ModuleType, place: str, name: str) -> str:
    public = [known for known in vars(module) if not known.startswith("_")]
    close = difflib.get_close_matches(name, public, n=1)
    fix = f"did you mean {close[0]}?" if close else f"define it there or correct the name in {place}:{name}"
    if place.endswith(".py"):
        return f"{place} holds no {name}; {fix}"
    # `queue:score` is the standard library's queue, also beside a file queue.py.
    origin, beside = getattr(module, "__file__", None) or "built into Python", _file_beside(place)
    if os.path.isfile(beside) and str(beside.resolve()) != origin:
        fix = f"it comes before the file of this name here: write {beside}:{name}"
    return f"{place} ({origin}) holds no {name}; {fix}"


def _file_beside(place: str) -> Path:
    """The file that a module's name would be here."""
    return Path(f"{place.replace('.', '/')}.py")
