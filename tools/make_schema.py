"""Write recipes/schema.json, with which editors complete and check recipes: `python tools/make_schema.py [--check]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.registry import BY_TYPE

TARGET = Path(__file__).parents[1] / "recipes" / "schema.json"


def make_schema() -> str:
    """Return the JSON schema of a sparse recipe: `base` is allowed, and no key is required since a base may hold it."""
    schema = Recipe.model_json_schema()
    _name_architectures(schema["$defs"])
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    schema["properties"]["base"] = {
        "type": "string",
        "description": "Recipe that this one starts from, relative to it.",
    }
    schema["title"] = "GSPO recipe"
    _allow_null_axes(schema["$defs"]["ObjectiveSection"])
    return json.dumps(schema, indent=1) + "\n"


def _name_architectures(definitions: dict[str, Any]) -> None:
    """A recipe's architecture is one of those that a family has."""
    classes = {cls.__name__: cls for family in BY_TYPE.values() for cls in family.architectures.values()}
    definitions |= {name: cls.model_json_schema() for name, cls in classes.items()}
    options = [{"$ref": f"#/$defs/{name}"} for name in classes]
    definitions["ModelSection"]["properties"]["architecture"]["anyOf"] = [*options, {"type": "null"}]


def _allow_null_axes(objective: dict[str, Any]) -> None:
    """Allow null for every axis: it takes the preset's value."""
    for name, value in objective["properties"].items():
        objective["properties"][name] = {
            "anyOf": [value, {"type": "null"}],
            "description": value.get("description", ""),
        }


def main() -> int:
    """Write the file. With --check, return 1 if it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if the file is out of date")
    made = make_schema()
    if parser.parse_args().check:
        return int(not TARGET.is_file() or TARGET.read_text() != made)
    TARGET.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
