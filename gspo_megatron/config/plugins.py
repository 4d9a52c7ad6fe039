"""Load a user's object by the name `file.py:NAME` or `package.module:NAME`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load_object(reference: str) -> Any:
    """Return the object at `path/to/file.py:NAME` or `package.module:NAME`.

    Raises:
        ValueError: the file, the module or the name does not exist.
    """
    place, _, name = reference.rpartition(":")
    if not (place and name):
        raise ValueError("it names no object; write file.py:NAME or package.module:NAME")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    if not hasattr(module, name):
        raise ValueError(f"{place} holds no {name}; define it there or correct the name in {reference}")
    return getattr(module, name)


def _load_module(place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ValueError(f"module {error.name} of {place} cannot be found; put it on the Python path") from None
    # The code of the module is the user's own and may raise anything; a name like `.a` is a TypeError.
    except Exception as error:
        raise _not_imported(place, error) from error


def _load_file(path: Path) -> ModuleType:
    resolved = path.resolve()
    # One module per file: a trust rule and a preset of one file share their globals, however often they are loaded.
    name = f"gspo_plugin_{resolved.stem}_{abs(hash(resolved)):x}"
    if name in sys.modules:
        return sys.modules[name]
    if not os.path.isfile(resolved):
        raise ValueError(f"{path} does not exist; give the path of a Python file (config/README.md, Paths)")
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise _not_imported(str(path), error) from error
        raise
    return module


def _not_imported(place: str, error: Exception) -> ValueError:
    return ValueError(f"{place} cannot be imported ({type(error).__name__}: {error}); correct it, then import it alone")
