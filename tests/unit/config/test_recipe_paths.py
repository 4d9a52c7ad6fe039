"""The one rule for paths: which keys follow it, what `~` and a relative path become, and who reads them afterwards."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gspo_megatron.config import Recipe, RecipeError, save_resolved
from gspo_megatron.config.field_rules import section_of
from gspo_megatron.config.recipe_paths import absolute_path, absolute_reference, holds_path, paths_of, short_path
from gspo_megatron.models import load_recipe, load_resolved
from tests.places import ROOT
from tests.unit.config.recipe_values import value_of

ROOT_HOME = pwd.getpwnam("root").pw_dir
"""Where `~root` leads to."""
TINY = ROOT / "recipes" / "tiny_moe.yaml"
NAMES = re.compile(r"(^|_)(path|paths|directory|cache|file|folder|hook|hooks)$")
CASES = settings(max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10, deadline=None, print_blob=True)


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        for inner in (section_of(field.annotation), *map(section_of, get_args(field.annotation))):
            if inner is not None:
                yield from fields_of(inner, f"{prefix}{name}.")
                break


def names_path(key: str, field: FieldInfo) -> bool:
    """Whether a key takes a path, by its type, by its name or by its documentation."""
    takes_text = any(kind is str for kind in (field.annotation, *get_args(field.annotation)))
    takes_reference = takes_text and "file.py:" in (field.description or "") and "dict" not in str(field.annotation)
    return "Path" in str(field.annotation) or bool(NAMES.search(key)) or takes_reference


def follows_the_rule(field: FieldInfo) -> bool:
    marks = any(type(part).__name__ == "PathMark" for part in field.metadata)
    return marks or holds_path(field.annotation)


def test_every_key_that_takes_a_path_follows_the_rule() -> None:
    keys = dict(fields_of(Recipe))
    paths = {key for key, field in keys.items() if names_path(key, field)}
    assert {
        "data.path",
        "model.path",
        "run.directory",
        "cold_start.cache",
        "objective.preset",
        "objective.trust",
    } <= paths
    assert [key for key in sorted(paths) if not follows_the_rule(keys[key])] == []


def test_a_path_of_a_file_is_relative_to_it_and_one_of_an_override_to_the_present_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "rule.py").write_text("def rule(terms): ...\n")
    (tmp_path / "below.yaml").write_text(f"base: {TINY}\ndata: {{path: below.jsonl}}\nrun: {{directory: ../runs/a}}\n")
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "base: ../below.yaml\ndata: {held_out_path: ./held.jsonl}\nobjective: {trust: 'rule.py:rule'}\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe(Path("../recipes/mine.yaml"), ["cold_start.cache=made", "model.path=null"])
    assert {key: str(path) for key, path in paths_of(recipe).items()} == {
        "run.directory": str(tmp_path.parent / "runs" / "a"),
        "data.path": f"{tmp_path}/below.jsonl",
        "data.held_out_path": f"{tmp_path}/recipes/held.jsonl",
        "cold_start.cache": f"{tmp_path}/elsewhere/made",
        "tokenizer.path": str(ROOT / "recipes" / "tokenizers" / "arithmetic.model"),
        "objective.trust": f"{tmp_path}/recipes/rule.py",
    }
    # What a role reads, wherever it is started.
    save_resolved(recipe, tmp_path / "recipe.resolved.yaml")
    monkeypatch.chdir("/")
    assert load_resolved(tmp_path / "recipe.resolved.yaml") == recipe


def test_the_caller_of_a_job_is_named_because_its_plan_is_made_in_the_checkout(tmp_path: Path) -> None:
    overrides = ["data.path=a.jsonl", "objective.preset=mine/dppo.py:DPPO", "data.held_out_path=~/b"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dppo.py").write_text((ROOT / "recipes" / "objectives" / "dppo.py").read_text())
    recipe = load_recipe(TINY, overrides, tmp_path)
    assert recipe.data.path == tmp_path / "a.jsonl"
    assert recipe.data.held_out_path == Path.home() / "b"
    assert recipe.objective.preset == f"{tmp_path}/mine/dppo.py:DPPO"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "/home/me"), ("~/a", "/home/me/a"), ("~/a b#c", "/home/me/a b#c"), ("./~/a", "/here/~/a"),
        ("a/~", "/here/a/~"), ("$HOME/a", "/here/$HOME/a"), ("${HOME}", "/here/${HOME}"), ("/a", "/a"), (".", "/here"),
        ("../a", "/a"), ("a/../b", "/here/b"), ("~root/x", f"{ROOT_HOME}/x"),
    ],
)  # fmt: skip
def test_what_a_text_becomes(text: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute_path(text, Path("/here")) == Path(path)


def test_two_dots_behind_a_link_are_those_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "far" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "below")
    found = absolute_path("link/../a", tmp_path)
    assert found == tmp_path / "link" / ".." / "a" and found.resolve() == tmp_path / "far" / "a"


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("a.py:f", "/here/a.py:f"), ("./a.py:f", "/here/a.py:f"), ("~/a.py:f", "/home/me/a.py:f"),
        ("/a.py:f", "/a.py:f"),
        ("package.module:f", "package.module:f"), ("gspo", "gspo"), ("odd:name.py:f", "/here/odd:name.py:f"),
    ],
)  # fmt: skip
def test_what_a_reference_becomes(text: str, reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute_reference(text, Path("/here")) == reference


def test_an_unknown_home_is_refused_by_key() -> None:
    with pytest.raises(RecipeError, match=r"data\.path: the home directory of ~nobody-here is not known"):
        load_recipe(TINY, ["data.path=~nobody-here/x"])


@pytest.mark.parametrize("text", ["x" * 256, "a/" + "\u00e9" * 128 + "/b", "y/" * 2100, "x" * 300 + ".py:f"])
@pytest.mark.parametrize("key", ["run.directory", "data.path", "model.path", "tokenizer.rendering"])
def test_a_path_that_no_file_can_have_is_refused_by_key(key: str, text: str) -> None:
    value = text if key != "tokenizer.rendering" or text.endswith(":f") else f"{text}.py:f"
    with pytest.raises(RecipeError, match=r"is longer than the name of a file can be") as refusal:
        load_recipe(TINY, [f"{key}={value}"])
    assert refusal.value.findings[0].key == key


def test_a_home_in_a_file_is_expanded_and_null_stays_null(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {TINY}\ndata: {{path: ~/a.jsonl, held_out_path: null}}\ntokenizer: {{path: 'null'}}\n")
    recipe = load_recipe(file)
    assert recipe.data.path == Path.home() / "a.jsonl" and recipe.data.held_out_path is None
    assert recipe.tokenizer.path == tmp_path / "null"
    file.write_text("base: ~nobody-here/x.yaml\n")
    with pytest.raises(RecipeError, match="base: the home directory of ~nobody-here"):
        load_recipe(file)
    for broken in ("path: ''", "path: ~", "path: [a]", "path: {a: 1}"):
        file.write_text(f"base: {TINY}\ndata: {{{broken}}}\n")
        with pytest.raises(RecipeError, match=r"data\.path"):
            load_recipe(file)


def test_a_removed_directory_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(RecipeError, match="that was removed; change to another directory"):
        load_recipe(TINY, ["data.path=a"])
    monkeypatch.chdir("/")


def test_people_see_short_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_path(tmp_path / "runs" / "a") == Path("runs/a")
    assert short_path(Path("/elsewhere/a")) == Path("/elsewhere/a")


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "...", ".a", "a/b", "/", "../up", "a\tb", "x" * 101, "\u00e9" * 51]
)
def test_a_name_that_is_no_part_of_a_path_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"run\.name"):
        load_recipe(TINY, [f"run.name={name}"])


@pytest.mark.parametrize("name", ["a", "a.", "a..b", "a b", "~", "-x", "null", "run:1"])
def test_other_names_are_kept(name: str) -> None:
    assert load_recipe(TINY, [f"run.name={name}"]).run.name == name


@CASES
@given(text=st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1))
def test_file_and_override_agree_on_every_text(text: str) -> None:
    """A path says the same in a file of the present directory and in an override, and is absolute in both."""
    quoted = text.replace("'", "''")
    found: list[Any] = []
    file = Path(f".path_of_{os.getpid()}.yaml")
    file.write_text(f"base: {TINY}\ndata: {{path: '{quoted}'}}\n", encoding="utf-8")
    try:
        for source, overrides in ((file, []), (TINY, [f"data.path={text}"])):
            try:
                found.append(value_of(load_recipe(source, overrides), "data.path"))
            except RecipeError as error:
                found.append([finding.key for finding in error.findings])
    finally:
        file.unlink()
    if text != "null":
        assert found[0] == found[1] and (isinstance(found[0], list) or found[0].is_absolute()), ascii(text)
