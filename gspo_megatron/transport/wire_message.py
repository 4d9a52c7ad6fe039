"""The base of all messages between processes: JSON out, JSON in, and a sentence for whatever does not fit.

Imports neither torch nor numpy.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SAME_VERSION = "run trainer, controller and servers from the same version of this package"


class MessageError(ValueError):
    """A message that its receiver cannot read; one sentence with the class and the field."""


class WireMessage(BaseModel):
    """Base of all messages: frozen, without unknown fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True, ser_json_inf_nan="constants"
    )

    def to_json(self) -> str:
        """The message as it is sent."""
        return self.model_dump_json(by_alias=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a message. Raises MessageError for text that is not exactly one message of this class."""
        try:
            return cls.model_validate_json(text, strict=True, by_alias=True, by_name=False)
        except ValidationError as error:
            raise MessageError(_sentence(cls.__name__, error)) from None


def _sentence(name: str, error: ValidationError) -> str:
    """The first fault of a message in words."""
    fault = error.errors(include_url=False)[0]
    field = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        return f"message {name} lacks its field {field}; {SAME_VERSION}"
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"message {name} has no field {field}; {SAME_VERSION}"
    where = f"field {field} is wrong: " if field else ""
    if fault["type"] == "value_error" and "ctx" in fault:  # a rule of ours, whose sentence has its own fix
        return f"message {name}: {where}{fault['ctx']['error']}"
    return f"message {name}: {where}{fault['msg']}; {SAME_VERSION}"


def json_key(name: str) -> Any:
    """A field with another key in JSON: checkpoints of earlier commits hold it under that key."""
    return Field(validation_alias=name, serialization_alias=name)
