"""From the keys of a `config.json`, or of a recipe's `model.architecture`, to the fields of an architecture.

Both are read as transformers reads a `config.json`: other names, null, defaults, which of two spellings of rotary
embeddings wins. A file may leave out any key. A recipe names the sizes of its model, and no key without effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.refusal import key_text, quote
from gspo_megatron.models import rope
from gspo_megatron.models.config_keys import HEADS, IGNORED, QUOTIENT, REFUSED, ConfigKeys
from gspo_megatron.models.family import Family
from gspo_megatron.types import Finding

PLACE = ("model", "architecture")
"""Where the keys of an architecture stand in a recipe."""
JSON_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "whole number"),
    float: ((int, float), "number"),
    bool: ((bool,), "true or false"),
}


def read_keys(
    cls: type[Architecture], family: Family, values: Mapping[str, Any], from_file: bool
) -> tuple[dict[str, Any], list[Finding]]:
    """The fields that the keys say, still to be checked as a whole, and what is wrong with single keys.

    Args:
        cls: class of the architecture.
        family: its family.
        values: key -> value; numbers are numbers.
        from_file: whether they are all keys of a `config.json`.
    """
    model_type = values["model_type"]
    keys = family.config_keys[model_type]
    # The other name comes last and wins.
    renamed = {name: value for name, value in values.items() if name not in keys.aliases}
    renamed |= {keys.aliases[name]: value for name, value in values.items() if name in keys.aliases}
    given = {name: value for name, value in renamed.items() if name in keys.fields}
    findings = [*_differing(family.name, keys, renamed)]
    if from_file:
        findings += [*_wrong_types(cls, keys, given)]
    fields = _filled(keys, given, from_file)
    rotary, faults = rope.read_rope(
        {name: value for name, value in renamed.items() if name in rope.KEYS},
        fields.get("max_position_embeddings"),
        family.rope_types,
    )
    findings += faults
    rest = {name for name in renamed if not (name in keys.fields or name in rope.KEYS or keys.allowed(name))}
    if from_file:
        findings += [*_unread(rest - IGNORED - {"model_type"})]
    else:
        # The schema knows none of them, and says so.
        fields |= {name: renamed[name] for name in rest}
    return {"model_type": model_type, **fields, **({} if faults else rotary)}, findings


def _differing(family: str, keys: ConfigKeys, values: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys with a value that the trainer does not compute."""
    for name, value in values.items():
        row = keys.allowed(name)
        if row is None or row.allows(value, values.get("num_hidden_layers")):
            continue
        wanted = quote(row.values[0])
        yield Finding(
            "model-key-differs", "error", ".".join((*PLACE, name)),
            f"{quote(value)}: models/{family} computes {name}={wanted}{' in every layer' if row.each else ''} only",
            f"set {name}={wanted} if the weights allow it, or take another model",
        )  # fmt: skip


def _wrong_types(cls: type[Architecture], keys: ConfigKeys, given: Mapping[str, Any]) -> Iterator[Finding]:
    """Values of a file that JSON types otherwise than the key."""
    for name, value in given.items():
        types, words = JSON_TYPES[cls.model_fields[name].annotation]
        if value is None and keys.fields[name].null is not REFUSED:
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            key = ".".join((*PLACE, name))
            yield Finding("wrong-value", "error", key, f"{quote(value)} is no {words}", "set a value of that type")


def _filled(keys: ConfigKeys, given: Mapping[str, Any], from_file: bool) -> dict[str, Any]:
    """The fields with transformers' values for what is absent or null; those of a recipe only if others say them."""
    fields = dict(given)
    for name, row in keys.fields.items():
        if name not in given and (from_file or row.default in (HEADS, QUOTIENT)):
            fields[name] = row.default
        elif name in given and given[name] is None and row.null is not REFUSED:
            fields[name] = row.null
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    quotient = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 else None
    derived = {HEADS: heads, QUOTIENT: quotient}
    filled = {name: derived[value] if value in (HEADS, QUOTIENT) else value for name, value in fields.items()}
    # What cannot be derived is missing; the key that it would come from is named.
    return {name: value for name, value in filled.items() if value is not None or name in given}


def _unread(names: set[str]) -> Iterator[Finding]:
    if names:
        shown = ", ".join(key_text([name]) for name in sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
        yield Finding(
            "model-key-unread", "warning", "model.path",
            f"config.json has {shown}, which neither transformers nor the trainer reads in this model_type",
            "remove the keys, or take another model if they change what it computes",
        )  # fmt: skip
