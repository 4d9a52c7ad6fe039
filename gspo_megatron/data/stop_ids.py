"""Which ids end a response: what generation_config.json of the model and the tokenizer name, together."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gspo_megatron.config.loading import RecipeError, refuse
from gspo_megatron.config.refusal import quote
from gspo_megatron.models.tokenizer_files import GENERATION_CONFIG, stop_file


def read_stop_ids(directory: Path, eos: int | None, known: Iterable[int], model: Path | None = None) -> tuple[int, ...]:
    """Return the ids that end a response, the tokenizer's own first.

    A tuned model often has the base model's generation_config.json, and a chat model lists ids there that its
    tokenizer does not name. So both count.

    Args:
        directory: of the tokenizer; it need not hold a generation_config.json.
        eos: the tokenizer's end-of-text id; None = it names none.
        known: every id of the vocabulary.
        model: directory of the model; None = that of the tokenizer.

    Raises:
        RecipeError: a file names something that is no id of the vocabulary, or none names an id.
    """
    named, ids = [], set(known)
    for place in dict.fromkeys((directory, model or directory)):
        file = stop_file(place)
        for value in _read_named(file) if file.exists() else []:
            # bool is a number to Python, and no id.
            if not isinstance(value, int) or isinstance(value, bool) or value not in ids:
                fault = f"eos_token_id={quote(value)} is no id of the tokenizer, which has {len(ids)}"
                raise _refuse_file(file, fault)
            named.append(value)
    own: list[Any] = [] if eos is None else [eos]
    found: tuple[int, ...] = tuple(dict.fromkeys(own + named))
    if not found:
        raise refuse(
            "stop-id-missing",
            "tokenizer.path",
            f"{directory} names no eos token, neither in the tokenizer nor in {GENERATION_CONFIG}: no "
            "response would stop",
            f"set eos_token in tokenizer_config.json, or eos_token_id in {GENERATION_CONFIG}",
        )
    return found


def _read_named(file: Path) -> list[Any]:
    """Return what a file names; nothing if it leaves it open."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refuse_file(file, f"it cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict):
        raise _refuse_file(file, "it is no JSON object")
    named = values.get("eos_token_id")
    if named == []:
        raise _refuse_file(file, "eos_token_id=[] says that no id ends a response")
    return named if isinstance(named, list) else [] if named is None else [named]


def _refuse_file(file: Path, fault: str) -> RecipeError:
    return refuse("stop-id-wrong", "tokenizer.path", f"{file}: {fault}", "correct it, or remove the key")
