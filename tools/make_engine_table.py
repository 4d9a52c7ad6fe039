"""Write gspo_megatron/config/engine_signatures.json: the arguments that the installed Megatron and vLLM have.

`gspo plan` reads the table, because it imports neither. A test compares the two; after a change of pins this program
is run again.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

TABLE = Path(__file__).resolve().parent.parent / "gspo_megatron" / "config" / "engine_signatures.json"
PLAIN = {bool: "bool", int: "int", float: "float", str: "text"}


def main() -> None:
    TABLE.write_text(to_text(make_table()), encoding="utf-8")
    print(f"wrote {TABLE}")


def to_text(table: dict[str, Any]) -> str:
    """The table as JSON, one line an argument."""
    engines = []
    for engine, kinds in table.items():
        classes = []
        for kind, arguments in kinds.items():
            rows = (f"   {json.dumps(name)}: {json.dumps(form, sort_keys=True)}" for name, form in arguments.items())
            classes.append(f"  {json.dumps(kind)}: {{\n" + ",\n".join(rows) + "\n  }")
        engines.append(f" {json.dumps(engine)}: {{\n" + ",\n".join(classes) + "\n }")
    return "{\n" + ",\n".join(engines) + "\n}\n"


def make_table() -> dict[str, Any]:
    """Engine -> class -> argument -> form."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig
    from vllm.engine.arg_utils import EngineArgs

    megatron = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
    return {
        "megatron": {kind.__name__: read_signature(kind) for kind in megatron},
        "vllm": {EngineArgs.__name__: read_signature(EngineArgs)},
    }


def read_signature(kind: Any) -> dict[str, dict[str, Any]]:
    """The arguments of a dataclass by name: type in words, choices, default, and the fields of one that is a config."""
    hints = hints_of(kind)
    return {
        field.name: describe(hints[field.name]) | {"default": plain(default_of(field))}
        for field in dataclasses.fields(kind)
        if field.init and not field.name.startswith("_")
    }


def hints_of(kind: Any) -> dict[str, Any]:
    """The annotations of a class; one that the library imports for type checkers only is taken as any type."""
    unknown: dict[str, Any] = {}
    while True:
        try:
            return get_type_hints(kind, localns=unknown)
        except NameError as error:
            unknown[str(error.name)] = Any


def describe(hint: Any) -> dict[str, Any]:
    """The form of an annotation that a recipe could write; `other` = none."""
    if get_origin(hint) in (Union, types.UnionType):
        forms = [describe(part) for part in get_args(hint) if part is not type(None)]
        # A word of a list may stand beside what it does not list: the choices are those that are known.
        known = [form for form in forms if form["type"] != "other"]
        return next((form for form in known if "choices" in form), known[0] if known else {"type": "other"})
    if get_origin(hint) is Literal:
        return {"type": PLAIN[type(get_args(hint)[0])], "choices": list(get_args(hint))}
    if get_origin(hint) in (list, tuple, set):
        inner = describe(get_args(hint)[0]) if get_args(hint) else {"type": "other"}
        return {"type": f"list of {inner['type']}"}
    if hint is dict or get_origin(hint) is dict:
        return {"type": "mapping"}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"type": "text", "choices": [member.name for member in hint]}
    if dataclasses.is_dataclass(hint):
        return {"type": "mapping", "fields": sorted(field.name for field in dataclasses.fields(hint))}
    return {"type": PLAIN.get(hint, "other")}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of an argument; None where it has none or makes it anew."""
    if field.default_factory is not dataclasses.MISSING:
        return None
    return None if field.default is dataclasses.MISSING else field.default


def plain(value: Any) -> Any:
    """A default as JSON."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool | int | float | str):
        return value if value != float("inf") else "inf"
    return list(value) if isinstance(value, tuple | list) else str(value)


if __name__ == "__main__":
    main()
