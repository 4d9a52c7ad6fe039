"""Generated texts: a recipe keeps them, gives them back, or refuses them in one printable line.

`make fuzz` tries 1,000 of each kind.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gspo_megatron.config import Recipe, RecipeError, save_resolved
from gspo_megatron.config.field_rules import is_text, section_of
from gspo_megatron.config.recipe_paths import absolute_path
from gspo_megatron.models import load_recipe as load
from gspo_megatron.models import load_resolved
from gspo_megatron.models import parse_recipe as parse
from gspo_megatron.plan.explain import all_keys
from tests.unit.config.recipe_values import value_of

pytestmark = pytest.mark.timeout(900)
CASES = settings(max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10, deadline=None, print_blob=True)
TINY = Path("recipes/tiny_moe.yaml").resolve()
SMALL = """
model: {architecture: {vocab_size: 96, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
  num_key_value_heads: 1, head_dim: 8, intermediate_size: 8, moe_intermediate_size: 8, num_experts: 2,
  num_experts_per_tok: 1, max_position_embeddings: 64, rope_theta: 1.0e+4}}
data: {path: problems.jsonl}
rollout: {max_answer_tokens: 8, max_prompt_tokens: 8, thinking: {budget: 4}}
environment: {name: calculator}
cold_start: {demonstrations: column_addition, steps: 1, batch_size: 1, lr: 1e-3}
"""
# Their texts name something that must exist, lie in a section that is left out, or exclude a key that is set.
NAMES = (
    "objective.preset", "objective.trust", "model.path", "cold_start.path", "reward.judge.url", "reward.judge.model",
    "reward.judge.key_variable", "teacher.url", "teacher.model", "teacher.key_variable", "tokenizer.rendering",
    "data.source",
)  # fmt: skip

pieces = st.sampled_from((
    "#", " #", "####", ": ", ":", "{", "}", "[", "]", ",", "'", '"', "\\", "\\\\", "${x}", "$", "yes", "on", "null",
    "~", "010", "0x1F", "1_0", "1e3", "1e-6", "4:00:00", ".inf", "nan", "-", "- ", "? ", "&a", "*a", "!a", "%", "@",
    "`", "|", ">", "---", "...", "<<", "=", " ", "  ", "\n", "\t", "\u00a0", "\u2028", "\ufeff", "\u0301", "\U0001f600",
    "\\boxed{}", "\neq", "\text", "true", "7",
))  # fmt: skip
characters = st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t")
texts = st.text(characters) | st.lists(pieces | st.text(characters, max_size=3), max_size=6).map("".join)
broken_texts = (
    st.text() | st.lists(pieces | st.text(), max_size=6).map("".join) | st.text(st.characters(categories=["Cs", "Cc"]))
)
names = st.text("abcxyz_-. 0:#'\u00e4", max_size=8) | st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])
)
numbers = st.integers(-(10**17), 10**17) | st.floats(allow_nan=False, allow_infinity=False)
options = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@contextmanager
def file_of(content: str | bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        yield path


@lru_cache
def text_keys() -> list[str]:
    found = []
    for key in all_keys():
        # The keys of an architecture are those of its family, and a name of the family is no free text.
        if key.startswith("model.architecture."):
            continue
        annotation: Any = Recipe
        for part in key.split("."):
            section = section_of(annotation)
            assert section is not None
            annotation = section.model_fields[part].annotation
        if is_text(annotation) and key not in NAMES:
            found.append(key)
    return found


def verdict(path: Path, *overrides: str) -> Recipe | None:
    """The recipe, or None where it is refused in printable lines; anything else raises."""
    try:
        return load(path, overrides)
    except RecipeError as error:
        assert error.findings
        for finding in error.findings:
            line = str(finding)
            assert line.isprintable() and len(line) < 1500, ascii(line)
            assert finding.message and finding.fix and finding.key, line
        return None


def test_the_keys_that_take_text_are_found() -> None:
    wanted = {"run.name", "run.directory", "data.path", "data.held_out_path", "reward.answer_marker",
              "tokenizer.system_prompt", "tokenizer.path", "cold_start.cache", "environment.reply",
              "rollout.thinking.closing"}  # fmt: skip
    assert wanted <= set(text_keys())


@CASES
@given(data=st.data(), text=texts)
def test_overrides_of_text_keep_the_text(data: st.DataObject, text: str) -> None:
    key = data.draw(st.sampled_from(text_keys()))
    assume(text != "null")
    with file_of(SMALL) as path:
        try:
            recipe = load(path, [f"{key}={text}"])
        except RecipeError:
            # Only a path and a name have texts that they cannot be.
            is_path = key.endswith(("path", "directory", "cache", "name", "program"))
            # The small recipe has demonstrations of a writer, beside which there is no file of them.
            other_home = text.startswith("~") or key.endswith(("name", "program")) or key == "cold_start.path"
            assert is_path and (not text or other_home or re.search("[\n\t\u2028\u2029]", text)), ascii(text)
            return
    found = value_of(recipe, key)
    assert found == (absolute_path(text) if isinstance(found, Path) else text)


@CASES
@given(
    marker=texts,
    prompt=texts,
    tree=st.dictionaries(names, options, max_size=3),
    reasons=st.dictionaries(names, texts),
)
@example("\neq", "\ttext", {"\x7e": "~", "<<": [], "": "", "=": "010", "a" * 200: "1e3"}, {"yes": "no"})
def test_the_resolved_recipe_reads_back_equal(
    marker: str, prompt: str, tree: dict[str, Any], reasons: dict[str, str]
) -> None:
    values = load(TINY).model_dump(mode="json")
    values["reward"]["answer_marker"], values["tokenizer"]["system_prompt"] = marker, prompt
    values["data"]["options"], values["acknowledge"] = tree, reasons
    values["run"]["directory"] = f"/a/{prompt}".translate(dict.fromkeys(map(ord, "\n\t\u2028\u2029"), "_"))
    recipe = parse(values)
    assert (recipe.reward.answer_marker, recipe.tokenizer.system_prompt) == (marker, prompt)
    assert (recipe.data.options, recipe.acknowledge) == (tree, reasons)
    with file_of("") as path:
        save_resolved(recipe, path)
        again = load_resolved(path)
        assert again == recipe
        assert again.model_dump_json() == recipe.model_dump_json()


@CASES
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])))
def test_single_quotes_in_a_file_keep_the_text(text: str) -> None:
    quoted = text.replace("'", "''")
    with file_of(f"{SMALL}reward: {{answer_marker: '{quoted}'}}\nacknowledge: {{'{quoted}': '{quoted}'}}\n") as path:
        recipe = load(path)
    assert recipe.reward.answer_marker == text and recipe.acknowledge == {text: text}


@CASES
@given(text=st.text("0123456789+-_.xobeEinfa: ,", max_size=6) | numbers.map(repr))
@pytest.mark.parametrize("key", ["run.seed", "optimizer.lr", "rollout.expert_parallel"])
def test_accepted_numbers_are_decimal(key: str, text: str) -> None:
    with file_of(SMALL) as path:
        recipe = verdict(path, f"{key}={text}")
    if recipe is None:
        return
    if key == "run.seed":
        assert re.fullmatch("[+-]?[0-9]{1,20}", text) and recipe.run.seed == int(text)
    else:
        assert re.fullmatch(r"[+-]?[0-9.]+([eE][+-]?[0-9]+)?", text) and recipe.optimizer.lr == float(text)


@CASES
@given(seed=st.integers(0, 10**17), lr=st.floats(0, allow_infinity=False, exclude_min=True))
def test_decimal_numbers_are_accepted(seed: int, lr: float) -> None:
    with file_of(SMALL) as path:
        recipe = load(path, [f"run.seed={seed}", f"optimizer.lr={lr!r}"])
    assert (recipe.run.seed, recipe.optimizer.lr) == (seed, lr)


@CASES
@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.binary(max_size=4)), max_size=6), st.binary())
def test_any_bytes_are_a_recipe_or_a_sentence(changes: list[tuple[int, bytes]], tail: bytes) -> None:
    content = bytearray(SMALL.encode())
    for place, added in changes:
        content[place : place + len(added)] = added
    for whole in (bytes(content) + tail, tail, b"data:\n  options: " + tail):
        with file_of(whole) as path:
            verdict(path)


@CASES
@given(broken_texts, broken_texts)
def test_any_yaml_is_a_recipe_or_a_sentence(one: str, two: str) -> None:
    text = f'{one}\ndata:\n  options: {{{two}: {one}}}\n  path: {two}\nreward: {{answer_marker: "{two}"}}\n'
    with file_of(SMALL.replace("data:", "run:", 1).encode() + text.encode(errors="surrogatepass")) as path:
        verdict(path)


@CASES
@given(st.data(), broken_texts, broken_texts)
def test_any_override_is_a_recipe_or_a_sentence(data: st.DataObject, text: str, other: str) -> None:
    key = data.draw(st.sampled_from([*all_keys(), "data.options.a", "data.mixture.a b", "acknowledge.a", ""]))
    # A model directory that is not there is another part's fault to name.
    assume(not key.startswith("model.path"))
    words = (
        f"{key}={text}",
        f"{key}={json.dumps(text)}",
        f"{key}=[{text}]",
        f"{key}={{{text}: {other}}}",
        f"{key}{text}={other}",
        text,
    )
    with file_of(SMALL) as path:
        for word in words:
            verdict(path, word)
