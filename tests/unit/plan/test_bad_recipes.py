"""Every recipe of tests/data/bad_recipes has one fault, named in its second line; the plan must find it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from gspo_megatron.config import RecipeError
from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.command import add_arguments, run
from gspo_megatron.types import Finding

FOLDER = Path("tests/data/bad_recipes")
BAD = sorted(FOLDER.glob("*.yaml"))
SHIPPED = sorted(Path("recipes").glob("*.yaml"))


def expected(path: Path) -> tuple[str, str, str]:
    line = path.read_text().splitlines()[1]
    severity, code, key = line.removeprefix("# expect: ").split()
    return severity, code, key


def found_in(path: Path) -> list[Finding]:
    try:
        return list(make_plan(load_recipe(path)).findings)
    except RecipeError as error:
        return list(error.findings)


def test_there_are_enough_of_them() -> None:
    assert len(BAD) >= 60


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_the_fault_is_found(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    severity, code, key = expected(path)
    found = found_in(path)
    match = [finding for finding in found if (finding.severity, finding.code, finding.key) == (severity, code, key)]
    assert match, f"wanted {severity} {code} {key}, got:\n" + "\n".join(map(str, found))
    assert all(len(finding.message) > 5 and len(finding.fix) > 3 for finding in found)
    assert plan_command(path, "--json") == (2 if any(finding.severity == "error" for finding in found) else 0)
    printed = json.loads(capsys.readouterr().out)["findings"]
    assert [code, severity, key] in [[entry["code"], entry["severity"], entry["key"]] for entry in printed]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_have_neither_errors_nor_unacknowledged_warnings(path: Path) -> None:
    assert [finding for finding in found_in(path) if finding.severity != "info"] == []


def plan_command(path: Path, *options: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers())
    return run(parser.parse_args(["plan", str(path), *options]))
