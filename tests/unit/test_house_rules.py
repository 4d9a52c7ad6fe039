"""The rules of the house, read off the source: who may import whom, how long a file may be, that recipes parse."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
import tokenize
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
    frozenset(
        {
            "cluster",
            "plan",
            "run_dir",
            "directory_lock",
            "own_directory",
            "metric_rows",
            "run_log",
            "http_clients",
            "model_requests",
            "sinks",
        }
    ),
    frozenset({"objective", "data", "rewards", "environments"}),
    frozenset({"transport", "report"}),
    frozenset({"policy"}),
    frozenset({"trainer", "controller", "inference", "evaluation"}),
    frozenset({"convert"}),
    frozenset({"commands"}),
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
# Ways to send an HTTP request that take a proxy from the environment.
CLIENT_LIBRARIES = ("requests", "urllib3", "openai", "pycurl")
MAKES_CLIENT = re.compile(
    r"\b(httpx\.(Client|AsyncClient|get|post|put|patch|delete|head|options|request|stream)"
    r"|aiohttp\.(ClientSession|request)|urllib\.request\.(urlopen|build_opener|urlretrieve)|http\.client\.HTTPS?Connection"
    rf"|({'|'.join(CLIENT_LIBRARIES)})\.)"
)
# Words of a README outside tables and code; those of three folders have more to say.
MAX_README_WORDS, README_WORDS = 600, {"objective": 900, "controller": 900, "recipes": 900}
# Words that a reader of the field has to translate first.
FOREIGN = re.compile(
    r"\b(mend(s|ed|ing)?|dearest|begun|gets on|got on|told|fences?|fenced|mailbox(es)?|drafts?|stands? for|stood for)\b"
)
# Tokens that others named: a key of state.json, which earlier versions wrote; an attribute that vLLM reads.
GIVEN = ('"drafts"', "supports_draft_weight_update", r'r"ControllerState has no field drafts\.0\.segments\.0\.worker"')
WORDED = (tokenize.NAME, tokenize.STRING, tokenize.COMMENT, tokenize.FSTRING_MIDDLE)
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
    roles = ("trainer", "controller", "inference", "evaluation")
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
        for path in [*sources(*WITHOUT_TORCH), *sorted((PACKAGE / "transport").glob("*.py"))]
        for line, module in imports_of(path)
        if module.split(".")[0] == "torch"
    ]
    assert not wrong, "\n".join(wrong)


def clients_made(path: Path) -> Iterator[str]:
    """Where a file makes an HTTP client or sends a request without one of `http_clients`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            name = " ".join(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            name = " ".join(f"{alias.name}." for alias in node.names if alias.name in CLIENT_LIBRARIES)
        else:
            continue
        if MAKES_CLIENT.search(name):
            yield f"{path}:{node.lineno}: {name}"


def test_every_http_client_is_made_in_one_place(tmp_path: Path) -> None:
    made = [entry for path in sources("gspo_megatron", "launch", "tools") if path.stem != "http_clients"
            for entry in clients_made(path)]  # fmt: skip
    assert not made, "use gspo_megatron/http_clients.py, which leaves out the site's proxies:\n" + "\n".join(made)
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import requests\nfrom aiohttp import ClientSession\nhttpx.get(url)\nhttpx.Client()\nhttpx.AsyncClient()\n"
        "urllib.request.urlopen(url)\naiohttp.ClientSession()\naiohttp.request('GET', url)\nimport openai\n"
    )
    assert len(list(clients_made(wrong))) == 9
    wrong.write_text(
        "import aiohttp, httpx\nhttpx.Timeout(1)\naiohttp.ClientError\nself._client.request()\nweb.get()\n"
    )
    assert list(clients_made(wrong)) == []


def test_test_modules_do_not_import_from_each_other() -> None:
    """What several of them use stands in a module named after it."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in sources("tests")
        for line, module in imports_of(path)
        if module.startswith("tests.") and any(part.startswith("test_") for part in module.split("."))
    ]
    assert not wrong, "move what they share into a module of its own:\n" + "\n".join(wrong)


@pytest.mark.parametrize("package", ["config", "plan", "transport.messages", "transport.update_messages"])
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


def test_messages_need_no_numpy() -> None:
    code = "import sys, gspo_megatron.transport.routes; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


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


def readmes() -> list[Path]:
    """Every README of the repository."""
    folders = ("gspo_megatron", "launch", "recipes", "requirements", "tests", "tools")
    return [ROOT / "README.md", *sorted(path for folder in folders for path in (ROOT / folder).rglob("README.md"))]


def prose(text: str) -> str:
    """A README without its tables and code blocks."""
    kept, is_code = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code and not line.lstrip().startswith("|"):
            kept.append(line)
    return "\n".join(kept)


def test_prose_is_what_is_neither_table_nor_code() -> None:
    assert prose("# One\n\n| a | b |\n```bash\nls\n```\ntwo three\n").split() == ["#", "One", "two", "three"]


@pytest.mark.parametrize("readme", readmes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_readmes_stay_short(readme: Path) -> None:
    count, budget = len(prose(readme.read_text()).split()), README_WORDS.get(readme.parent.name, MAX_README_WORDS)
    assert count <= budget, f"{count} words outside tables and code, {budget} are allowed; dated notes go to NOTES.md"


def words_of(token: tokenize.TokenInfo) -> str:
    """A token as plain words: `tokensToldOf` and `tokens_told_of` are `tokens told of`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", token.string).replace("_", " ").lower()


def foreign_words(path: Path) -> Iterator[str]:
    """Where a README or a source uses a word that is not the field's: names, comments, docstrings and sentences."""
    if path.suffix == ".md":
        lines = enumerate(path.read_text().lower().splitlines(), 1)
    else:
        with path.open("rb") as source:
            tokens = [token for token in tokenize.tokenize(source.readline) if token.string not in GIVEN]
        lines = ((token.start[0], words_of(token)) for token in tokens if token.type in WORDED)
    for line, text in lines:
        for found in FOREIGN.finditer(text):
            yield f"{path}:{line}: {found.group()}"


def test_foreign_words_are_found_in_names_comments_and_sentences(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text('tokens_told = draftOf = f"it {1} gets on"  # begun\nfound = state["drafts"]\nrecommended = 1\n')
    found = [entry.partition(": ")[2] for entry in foreign_words(source)]
    assert found == ["told", "draft", "gets on", "begun"]


def test_words_are_the_field_s() -> None:
    worded = [path for path in sources("gspo_megatron", "launch", "tools", "tests") if path != Path(__file__)]
    found = [entry for path in [*readmes(), *worded] for entry in foreign_words(path)]
    assert not found, "say it in the field's words (CONTRIBUTING.md):\n" + "\n".join(found)
