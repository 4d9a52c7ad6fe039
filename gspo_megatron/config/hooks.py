"""The table of hooks: every place where a recipe takes an object of the user's own by `file.py:NAME`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gspo_megatron.config.plugins import load_object
from gspo_megatron.config.refusal import refuse


@dataclass(frozen=True, slots=True)
class Hook:
    """One kind of object that a user can supply."""

    name: str
    """Name of the kind, as `gspo check --hook` takes it."""
    key: str
    """Recipe key that names the object."""
    signature: str
    """What the object must be, as the README shows it."""
    default: str
    """What runs where the key is not set."""
    example: str
    """A working object in this repository, `recipes/...py:NAME`."""
    contract: str
    """`module:NAME` of the function that checks an object: it takes the object and raises ValueError with a sentence."""


HOOKS: dict[str, Hook] = {}
"""Name -> hook. The contract is named by text, because the part that owns it lies above this one."""


def is_reference(text: str) -> bool:
    """Whether a value of a key names a user's object, and not one of the built-in choices."""
    return ":" in text


def load_hook(name: str, reference: str) -> Any:
    """Return the object that a recipe names, after its contract was checked.

    Raises:
        RecipeError: it cannot be imported, or is not what the hook takes.
    """
    hook = HOOKS[name]
    try:
        found = load_object(reference)
        load_object(hook.contract)(found)
    except ValueError as fault:
        raise refuse("hook", hook.key, f"{reference}: {fault}", f"see `gspo check {reference}`") from None
    return found
