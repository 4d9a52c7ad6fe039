"""What people type by mistake: every command ends with a sentence and code 2, never with a traceback."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from gspo_megatron.cli import COMMANDS, main
from tests.places import ROOT

TINY = ROOT / "recipes" / "tiny_moe.yaml"
CASES = int(os.environ.get("GSPO_FUZZ", "1000")) // 10
PARTS = [
    "", " ", ".", "..", "=", "==", ":", "/", "~", "~nobody/x", "-1", "--", "run", "run.seed", "run.seed=1",
    " run.seed=1", "x.py:f", ":f", "x:", "a b", "\u00fc", "\x00", "\n", "${x}", "{", "[1", "*a", "!!int", "'", '"',
    "null", "nan", "1e999",
]  # fmt: skip


def outcome(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and the last line of the errors."""
    try:
        code = main(words)
    except SystemExit as ended:  # argparse
        assert isinstance(ended.code, int)
        code = ended.code
    said = capsys.readouterr().err.strip().splitlines()
    return code, said[-1] if said else ""


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_a_command_without_arguments_says_what_it_needs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = outcome(capsys, *filter(None, [command]))
    assert code == 2
    assert "required" in said or "name a recipe" in said
    assert "key=value" not in said, "overrides are never required"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["train", "DIR"], "does not exist or is no file"),
        (["train", "DIR/loop.yaml"], "does not exist or is no file"),
        (["plan", "DIR/loop.yaml"], "does not exist or is no file"),
        (["plan", str(TINY), "run.seed"], "run.seed: is not of the form section.key=value"),
        (["plan", str(TINY), " run.seed=1"], "is not of the form section.key=value"),
        (["plan", str(TINY), "run.seed =1"], "is not of the form section.key=value"),
        (["plan", "--explain", ""], "'': is not a key of the recipe"),
        (["check", "x"], "x: it names no object; write file.py:NAME or package.module:NAME"),
        (["check", ":x"], ":x: it names no object"),
        (["check", "x.py:"], "x.py:: it names no object"),
        (["report", "DIR"], "holds no metrics.jsonl"),
        (["debug", "DIR"], "holds no bundle.json"),
    ],
)
def test_a_mistake_is_said_in_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    code, said = outcome(capsys, *(word.replace("DIR", str(tmp_path)) for word in words))
    assert (code, sentence in said) == (2, True), said


def test_a_recipe_whose_path_holds_an_equals_sign_is_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a=b.yaml").write_text(f"base: {TINY}\n")
    assert outcome(capsys, "plan", str(tmp_path / "a=b.yaml"), "--nodes", "1", "run.seed=2") == (0, "")


def test_arguments_of_chance_never_end_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing starts: what would train lacks its recipe or names a directory that cannot be made."""
    monkeypatch.chdir(tmp_path)
    chance = random.Random(0)
    for _ in range(CASES):
        command = chance.choice(["train", "plan", "report", "convert", "debug", "check"])
        first = [str(TINY)] if command == "plan" and chance.random() < 0.7 else []
        words = [chance.choice(PARTS) + chance.choice(["", "", *PARTS]) for _ in range(chance.randint(0, 3))]
        code, said = outcome(capsys, command, *first, *words)
        assert code in (0, 2), (command, words)
        assert code == 0 or said, (command, words)
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing"
