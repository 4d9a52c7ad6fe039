"""The table of hooks: complete rows, which the README shows; and a reference leads to an object or a sentence."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gspo_megatron.config.hooks import HOOKS, Hook, write_table
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.plugins import describe_fault, load_object
from tests.places import ROOT


@pytest.fixture(autouse=True)
def python_path() -> Iterator[None]:
    before = list(sys.path)
    yield
    sys.path[:] = before


def test_the_readme_shows_the_table() -> None:
    assert write_table() in (ROOT / "gspo_megatron/README.md").read_text(), f"write this there:\n{write_table()}"


@pytest.mark.parametrize("hook", HOOKS.values(), ids=lambda hook: hook.name)
def test_a_row_is_complete(hook: Hook) -> None:
    assert hook.parameters or hook.members, "nothing to recognise an object by"
    assert (ROOT / hook.example.rpartition(":")[0]).is_file()
    for place, parameters in ((hook.contract, 1), (hook.trial, 2)):
        module, _, name = place.partition(":")
        if not place:
            continue
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert f"def {name}(" in source
        if "import torch" not in source:
            inspect.signature(load_object(place)).bind(*[None] * parameters)


WRONG_FILES = {
    "def": "(SyntaxError: invalid syntax (mine.py, line 1))",
    "import nothing_of_this_name": "(ModuleNotFoundError: No module named 'nothing_of_this_name' (line 1))",
    "\n\n1 / 0": "(ZeroDivisionError: division by zero (line 3))",
    "raise SystemExit(3)": "it ends Python (SystemExit: 3); put what runs as a script under if __name__",
    "raise ValueError('one\\n\\ntwo')": "(ValueError: one two (line 1))",
    "def __getattr__(name): raise KeyError(name)": "(KeyError: 'score')",
    "def scores(): ...": "holds no score; did you mean scores?",
    "": "holds no score; define it there or correct the name",
    "\0": "cannot be imported (",
}


@pytest.mark.parametrize("code", WRONG_FILES)
def test_a_file_that_cannot_be_read_is_one_line(code: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(code)
    with pytest.raises(ValueError) as caught:
        load_object(f"{file}:score")
    assert WRONG_FILES[code] in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_file_that_failed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("1 / 0")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        load_object(f"{file}:score")
    file.write_text("score = 3")
    assert load_object(f"{file}:score") == 3


def test_a_file_of_another_directory_is_looked_for_where_the_command_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}/mine.py does not exist"):
        load_object("mine.py:score")


def test_a_file_may_import_its_neighbours_and_replaces_no_library(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("SCORE = 7")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('not this one')")
    (tmp_path / "mine.py").write_text("import colorsys\nfrom neighbour_of_mine import SCORE\nhsv = colorsys.rgb_to_hsv")
    assert load_object(f"{tmp_path}/mine.py:SCORE") == 7


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("colorsys:score", r"colorsys \(/.*colorsys.py\) holds no score; it comes before .*write colorsys.py:score"),
        # No other test may have a file of this name: the directories of files stay on the path of modules.
        ("only_here:score", r"module only_here of only_here cannot be found; write only_here.py:NAME"),
        ("nowhere.mine:score", r"module nowhere of nowhere.mine cannot be found; put it on the Python path"),
        (".mine:score", r"cannot be imported \(TypeError"),
        ("mine.py", "names no object"),
        ("mine.py:", "names no object"),
        (":score", "names no object"),
    ],
)
def test_a_reference_to_a_module_is_explained(
    reference: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("colorsys", "only_here"):
        (tmp_path / f"{name}.py").write_text("score = 1")
    with pytest.raises(ValueError, match=sentence):
        load_object(reference)


def test_what_a_module_prints_is_no_output_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("print('hello')\nscore = 1")
    assert load_object(f"{file}:score") == 1
    assert capsys.readouterr() == ("", "hello\n")


def test_what_a_file_prints_as_it_is_read_keeps_no_secret(tmp_path: Path) -> None:
    """It goes to the log of a role; a subprocess writes there past everything that Python's own streams are made of."""
    (tmp_path / "chatty.py").write_text(
        "import os, subprocess, sys\nprint(os.environ['MY_API_KEY'])\n"
        "subprocess.run(['sh', '-c', 'echo $MY_API_KEY; echo out $MY_API_KEY >&2'])\n"
        "def score(problem, response):\n    return 1.0\n"
    )
    code = "from gspo_megatron.config.plugins import load_object; load_object('chatty.py:score'); print('after')"
    environment = {**os.environ, "MY_API_KEY": "sesame-123", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "***\nafter\n" and sorted(done.stderr.split()) == ["***", "***", "out"]


def test_home_is_read_in_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "at_home.py").write_text("NAME = 5\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_object("~/at_home.py:NAME") == 5


def test_an_error_keeps_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "sk-123456")
    assert describe_fault(RuntimeError("401 for\nsk-123456")) == "RuntimeError: 401 for ***"
    assert len(describe_fault(RuntimeError("x" * 9999))) == 300


def test_a_file_without_a_name_in_a_recipe_is_explained() -> None:
    from gspo_megatron.models import load_recipe

    with pytest.raises(RecipeError, match=r"mine.py names no object in the file; write .*mine.py:NAME"):
        load_recipe(ROOT / "recipes/tiny_moe.yaml", ["reward.name=mine.py"])
