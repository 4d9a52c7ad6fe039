"""The rules of the house, read off the source: who may import whom, how long a file may be, that recipes parse."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gspo_megatron.models import load_recipe
from tests.places import ROOT

PACKAGE = ROOT / "gspo_megatron"

# From the bottom up. A part may import those of earlier rows and, unless its row is mutually blind, of its own row.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"types", "config"}),
    frozenset({"models", "parallel"}),
    frozenset({"cluster", "plan", "run_dir", "run_log"}),
    frozenset({"objective", "data", "rewards", "environments"}),
    frozenset({"transport", "report"}),
    frozenset({"policy"}),
    frozenset({"trainer", "controller", "inference"}),
    frozenset({"convert"}),
    frozenset({"cli"}),
)
MUTUALLY_BLIND = (3, 4, 6)
# Which part alone may import an engine.
OWNERS = {"vllm": "inference", "megatron": "policy", "transformer_engine": "policy", "apex": "policy"}
WITHOUT_TORCH = (
    "recipes", "launch", "gspo_megatron/config", "gspo_megatron/models", "gspo_megatron/cluster", "gspo_megatron/plan",
)  # fmt: skip
# Names that may stand in several folders of the package.
LIKE_NAMED = {"__init__"}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 70


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def part_of(path: Path) -> str:
    """`objective` for gspo_megatron/objective/loss.py, `loop` for gspo_megatron/trainer/loop.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import of a file, those inside functions included.

    `from gspo_megatron import objective` counts as gspo_megatron.objective.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, path)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def absolute(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).parent.parts
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def layer_of(part: str) -> int | None:
    return next((row for row, parts in enumerate(LAYERS) if part in parts), None)


def may_import(part: str, other: str) -> bool:
    row, other_row = layer_of(part), layer_of(other)
    assert row is not None and other_row is not None
    return part == other or other_row < row or (other_row == row and row not in MUTUALLY_BLIND)


def test_every_part_of_the_package_has_a_place_in_the_order() -> None:
    parts = {part_of(path) for path in sources("gspo_megatron")} - {"__init__", "__main__"}
    unplaced = sorted(part for part in parts if layer_of(part) is None)
    assert not unplaced, f"{unplaced} have no row in LAYERS: give them one, in design order"


def test_the_order_is_the_designs() -> None:
    assert may_import("objective", "types") and may_import("trainer", "transport") and may_import("config", "types")
    assert not may_import("models", "plan") and not may_import("policy", "trainer")
    roles = ("trainer", "controller", "inference")
    assert not any(may_import(one, other) for one in roles for other in roles if one != other)
    assert not may_import("data", "rewards") and not may_import("transport", "policy")
    everything = [part for row in LAYERS for part in row]
    assert len(everything) == len(set(everything))


def test_imports_run_one_way() -> None:
    wrong = []
    for path in sources("gspo_megatron"):
        for line, module in imports_of(path):
            names = module.split(".")
            # The package's own __init__ holds its version and is free to all.
            if names[0] != "gspo_megatron" or len(names) == 1 or layer_of(names[1]) is None:
                continue
            if not may_import(part_of(path), names[1]):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {part_of(path)} may not import {names[1]}")
    assert not wrong, "\n".join(wrong)


def test_no_import_runs_in_a_circle() -> None:
    files = {dotted(path): path for path in sources("gspo_megatron")}
    graph = {name: {target for target in (known(module, files) for _, module in imports_of(path)) if target}
             for name, path in files.items()}  # fmt: skip
    for name in graph:
        graph[name].discard(name)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def dotted(path: Path) -> str:
    """`gspo_megatron.config` for gspo_megatron/config/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def known(module: str, files: Mapping[str, Path]) -> str | None:
    """The file that an imported name is in."""
    while module and module not in files:
        module = module.rpartition(".")[0]
    return module or None


def test_no_file_name_stands_twice() -> None:
    places: dict[str, list[str]] = {}
    for path in sources("gspo_megatron"):
        families = path.parent.parent == PACKAGE / "models"
        if path.stem not in LIKE_NAMED and not families:
            places.setdefault(path.stem, []).append(str(path.relative_to(PACKAGE)))
    twice = [found for found in places.values() if len(found) > 1]
    assert not twice, "a name means one file: " + "; ".join(" and ".join(found) for found in twice)


def test_each_engine_has_one_owner() -> None:
    wrong = []
    for path in sources("gspo_megatron"):
        for line, module in imports_of(path):
            owner = OWNERS.get(module.split(".")[0])
            if owner is not None and part_of(path) != owner:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {module} may be imported under {owner}/ only")
    assert not wrong, "\n".join(wrong)


def test_what_a_launcher_needs_never_names_torch() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in sources(*WITHOUT_TORCH)
        for line, module in imports_of(path)
        if module.split(".")[0] == "torch"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["config", "plan"])
def test_it_imports_in_a_second_without_torch(package: str) -> None:
    """What neither a source line nor a dependency's import may bring in, seen in a fresh process."""
    code = (
        "import json, sys, time; started = time.process_time(); "
        f"import gspo_megatron.{package}; seconds = time.process_time() - started; "
        "print(json.dumps([seconds, [m for m in ('torch', 'megatron', 'vllm', 'transformers') if m in sys.modules]]))"
    )
    # Seconds of the processor, the quickest of three, with bytecode kept: what other processes do here does not count.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True) for _ in range(3)]
    results = [json.loads(run.stdout) for run in runs]
    assert [loaded for _, loaded in results] == [[], [], []]
    assert min(seconds for seconds, _ in results) < 1


def test_files_and_functions_stay_short() -> None:
    too_long = []
    for path in sources("gspo_megatron", "launch", "tools"):
        text, place = path.read_text(), path.relative_to(ROOT)
        if (count := text.count("\n")) > MAX_FILE_LINES:
            too_long.append(f"{place}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > MAX_FUNCTION_LINES:
                    too_long.append(f"{place}:{node.lineno}: {node.name} has {count} lines")
    budget = f"at most {MAX_FILE_LINES} lines a file and {MAX_FUNCTION_LINES} a function"
    assert not too_long, f"{budget}:\n" + "\n".join(too_long)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_parses(recipe: Path) -> None:
    load_recipe(recipe)


def test_source_is_ascii() -> None:
    files = sources("gspo_megatron", "launch", "tools")
    wrong = [str(path.relative_to(ROOT)) for path in files if not path.read_text().isascii()]
    assert not wrong, f"{wrong} hold characters outside ASCII"
