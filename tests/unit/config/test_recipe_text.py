"""How the text of a recipe is read: the type of a key decides, for overrides and for files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config import RecipeError, save_resolved
from gspo_megatron.models import load_recipe as load
from gspo_megatron.models import load_resolved
from tests.unit.config.recipe_values import value_of

TINY = Path("recipes/tiny_moe.yaml")
OLD = Path(__file__).with_name("resolved_by_3b203e7.yaml")


def refused(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    lines = [str(finding) for finding in caught.value.findings]
    assert all("\n" not in line for line in lines), lines
    return lines


def recipe_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "mine.yaml"
    base = f"base: {TINY.resolve()}\n"
    path.write_bytes(base.encode() + text if isinstance(text, bytes) else (base + text).encode())
    return path


TEXTS = (
    "####", "a # b", " # b", "yes", "on", "off", "no", "y", "True", "false", "010", "0x1F", "0o17", "1_000", "4:00:00",
    "1e3", "5.", ".5", ".inf", "nan", "~", "Null", "NULL", "none", "", " ", " leading", "trailing ", "a=b", "=", "a: b",
    "a:", "{", "}", "[a, b]", "{a: b}", "a, b", "'a'", '"a"', "'", '"', "it's", "\\boxed{}", "\\text{x}", "costs ${x}",
    "costs \\${x}", "${run.name}", "???", "&a", "*a", "!a", "!!int 1", "%a", "@a", "`a`", "| a", "> a", "- a", "? a",
    "---", "...", "<<", "2001-01-01", "line\nfeed", "a\tb", "\u00e4\u00f6 \u2028 \u00a0 \ufeff", "\U0001f600",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_keys_take_what_follows_the_sign(text: str, tmp_path: Path) -> None:
    keys = ("reward.answer_marker", "tokenizer.system_prompt")
    overrides = [f"{key}={text}" for key in keys]
    recipe = load(TINY, [*overrides, "acknowledge.some-code=" + text])
    for key in (*keys, "acknowledge.some-code"):
        assert value_of(recipe, key) == text
    save_resolved(recipe, tmp_path / "recipe.yaml")
    assert load_resolved(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    "text", ["/data/set #1.jsonl", "010", "~", "~/a", "a=b: {c}", "yes", "1e3", " a ", "'a'", "${x}"]
)
def test_path_keys_take_what_follows_the_sign(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    recipe = load(TINY, [f"data.path={text}", f"run.directory={text}", f"cold_start.cache={text}"])
    assert recipe.cold_start is not None
    assert [recipe.data.path, recipe.run.directory, recipe.cold_start.cache] == [
        Path.cwd() / text.removeprefix("~").lstrip("/" if text[0] == "~" else "")
    ] * 3
    save_resolved(recipe, tmp_path / "recipe.yaml")
    assert load_resolved(tmp_path / "recipe.yaml") == recipe


def test_null_is_the_word_null_where_a_key_may_be_null(tmp_path: Path) -> None:
    recipe = load(TINY, ["reward.answer_marker=null", "data.path=null", "trainer.ranks=null", "run.name=null"])
    assert (recipe.reward.answer_marker, recipe.data.path, recipe.trainer.ranks) == (None, None, None)
    assert recipe.run.name == "null"
    # Of the objective's axes null is the preset's value.
    assert load(TINY, ["objective.trust=null", "objective.preset=null", "objective.kl=null"]).objective.trust == "clip"
    quoted = load(recipe_file(tmp_path, "reward: {answer_marker: 'null'}\n"))
    assert quoted.reward.answer_marker == "null"
    save_resolved(quoted, tmp_path / "recipe.yaml")
    assert load_resolved(tmp_path / "recipe.yaml") == quoted


NUMBERS = [
    ("run.seed", "010", 10), ("run.seed", "+7", 7), ("run.seed", "0", 0), ("run.seed", "00", 0),
    ("trainer.max_steps", "1000", 1000), ("optimizer.lr", "1e-6", 1e-6), ("optimizer.lr", "1", 1.0),
    ("optimizer.lr", "5.", 5.0), ("optimizer.lr", ".5", 0.5), ("optimizer.lr", "+1.5E+0", 1.5),
    ("optimizer.lr", "010", 10.0), ("optimizer.lr", "0e0", 0.0), ("rollout.expert_parallel", "true", True),
    ("rollout.prefix_caching", "false", False), ("tokenizer.enable_thinking", "null", None),
    ("optimizer.betas", "[0.8, 1e-1]", (0.8, 0.1)), ("objective.correction", "tis", ("tis",)),
    ("objective.correction", "none", ()), ("objective.correction", "[tis, veto]", ("tis", "veto")),
    ("objective.advantage_ddof", "1", 1), ("objective.advantage_ddof", "01", 1),
    ("data.mixture.aime.2024", "3", None), ("placement.walltime_hours", "4", 4.0),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "value"), [row for row in NUMBERS if not row[0].startswith("data.")])
def test_numbers_are_decimal_in_overrides_and_files(key: str, text: str, value: Any, tmp_path: Path) -> None:
    found = value_of(load(TINY, [f"{key}={text}"]), key)
    assert (found, type(found)) == (value, type(value))
    section, name = key.split(".")
    if (key, text) != ("objective.correction", "none"):
        assert value_of(load(recipe_file(tmp_path, f"{section}:\n  {name}: {text}\n")), key) == value


WRONG = [
    *(("trainer.max_steps", text) for text in (
        "yes", "on", "true", "0x10", "0o17", "0b1", "1_000", "1,000", "1e3", "5.0", "4:00", "~", "", " 7", "7 ", "- 7",
        "--7", "+-7", ".inf", "nan", "none", "ten", "\u0663", "\uff17", "1 000", "9" * 30, "9" * 5000, "1\n", "null",
        "[1]", "{a: 1}", "'7'",
    )),
    *(("optimizer.lr", text) for text in (
        "on", "true", "0x1p-3", "1_0.0", "1,5", "1e400", "1e-400", ".inf", "-.inf", "inf", "Infinity", "nan", ".nan",
        ".", "e5", "1e", "1e5.5", "4:00:00", "", "~", "\u0663.5", "1e-6 ", "[1]", "1d3", "null",
    )),
    *(("rollout.expert_parallel", text) for text in (
        "yes", "no", "on", "off", "True", "FALSE", "1", "0", "t", "", "null",
    )),
    *(("tokenizer.enable_thinking", text) for text in ("yes", "1", "~", "None", "")),
    *(("placement.walltime_hours", text) for text in ("4:00:00", "0x4", "4h", "~")),
    *(("placement.gpu", text) for text in ("no", "~", "", "H100", " h100")),
    *(("model.architecture.hidden_size", text) for text in ("yes", "true", "1_000", "0x80", "128.0", "1e3", "~", "")),
    *(("model.architecture.tie_word_embeddings", text) for text in ("yes", "on", "1", "0", "True", "~")),
    *(("model.architecture.rope_theta", text) for text in ("1_0", "true", "4:00", "1e400")),
    *(("objective.advantage_ddof", text) for text in ("true", "1.0", "0x1", "2")),
    *(("optimizer.betas", text) for text in (
        "0.9,0.95", "[0.9]", "[0.9, yes]", "[0.9, 0x1]", "[0.9, 0.9", "[0.9, 4:00]", "{a: 1}", "[0.9, .inf]", "[0.9, ]",
        "[0.9, 0.9] [1]", "[0.9, ~]", "[0.9, true]",
    )),
    *(("data.mixture.aime", text) for text in ("yes", "010x", "1e3", "0x3", "", "~")),
    *(("batch", text) for text in ("8", "{prompts: 64", "{prompts: yes}", "{prompts: 8, prompts: 64}", "", "~")),
    *(("data.options.x", text) for text in ("1e400", "9" * 5000, "[.inf", "{a: 1, a: 2}", "[1e400]", "~", "[~]", "")),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text"), WRONG, ids=lambda text: text[:20])
def test_other_spellings_are_refused_with_key_value_rule_and_fix(key: str, text: str) -> None:
    lines = refused(TINY, f"{key}={text}")
    assert len(lines) == 1, lines
    assert f"] {key}" in lines[0] and "; " in lines[0]
    assert len(lines[0]) < 400


@pytest.mark.parametrize(
    "text", ["yes", "on", "0x10", "1_000", "1e3", "4:00", "~", ".inf", "true", "!!int 7", "7 8", ""]
)
def test_files_obey_the_same_rule(text: str, tmp_path: Path) -> None:
    (line,) = refused(recipe_file(tmp_path, f"# comment\ntrainer:\n  max_steps: {text}\n"))
    assert "trainer.max_steps" in line and "mine.yaml:4" in line


def test_what_yaml_1_1_reads_as_something_else_stays_text(tmp_path: Path) -> None:
    for text in (
        "yes",
        "no",
        "on",
        "off",
        "010",
        "0x1F",
        "4:00:00",
        "1_000",
        "2001-01-01",
        "1e3",
        "=",
        "y",
        "42",
        "true",
    ):
        recipe = load(recipe_file(tmp_path, f"reward: {{answer_marker: {text}}}\nacknowledge: {{{text}: {text}}}\n"))
        assert recipe.reward.answer_marker == text
        assert recipe.acknowledge == {text: text}


def test_options_follow_yaml_1_2() -> None:
    text = "{a: yes, b: 010, c: 1e3, d: 0x1F, e: 4:00, f: true, g: null, h: '7', i: [1, 1.5, x], j: {k: off}, l: 1_0}"
    wanted = {
        "a": "yes", "b": 10, "c": 1000.0, "d": "0x1F", "e": "4:00", "f": True, "g": None, "h": "7", "i": [1, 1.5, "x"],
        "j": {"k": "off"}, "l": "1_0",
    }  # fmt: skip
    options = load(TINY, [f"data.options={text}", "data.options.m.n=####"]).data.options
    assert {key: options[key] for key in wanted} == wanted
    assert options["m"] == {"n": "####"}
    arch = load(
        TINY, ["model.architecture.rope_scaling={rope_type: yarn, factor: 4.0, original_max_position_embeddings: 8}"]
    ).arch
    assert arch.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


ESCAPES = (
    "boxed{}", "frac", "rho", "alpha", "vec", "epsilon", "a_b\\_", "text{x}", "times", "theta", "neq", "nu", "nabla",
    "0", "Nabla", "Leq", "Pi", "x08", "u000c", "U0000001b", "x7f",
)  # fmt: skip


@pytest.mark.parametrize("escape", ESCAPES)
def test_escapes_that_were_meant_as_latex_are_refused_by_name(escape: str, tmp_path: Path) -> None:
    (line,) = refused(recipe_file(tmp_path, f'reward:\n  answer_marker: "\\{escape}"\n'))
    assert "reward.answer_marker" in line and "single quotes" in line and "mine.yaml:3" in line
    assert (
        load(recipe_file(tmp_path, f"reward:\n  answer_marker: '\\{escape}'\n")).reward.answer_marker == "\\" + escape
    )


def test_escapes_that_mean_what_they_say(tmp_path: Path) -> None:
    text = r'"\n<tool>\n{result}\n\"\\boxed\" \u00e4 \x41 \U0001F600 a\tb \/"'
    found = load(recipe_file(tmp_path, f"tokenizer: {{system_prompt: {text}}}\n")).tokenizer.system_prompt
    assert found == '\n<tool>\n{result}\n"\\boxed" \u00e4 A \U0001f600 a\tb /'
    (line,) = refused(recipe_file(tmp_path, 'tokenizer:\n  system_prompt: "\\sqrt{2}"\n'))
    assert "mine.yaml:3" in line and "single quotes" in line


@pytest.mark.parametrize("text", ["a\x08b", "\x0c", "\x00", "\x1b[31m", "\x7f", "a\rb", "\x85", "\ud800", "\udcff"])
@pytest.mark.parametrize(
    "key", ["reward.answer_marker", "data.path", "objective.preset", "data.options.x", "acknowledge.a"]
)
def test_control_characters_are_refused_by_name(key: str, text: str) -> None:
    (line,) = refused(TINY, f"{key}={text}")
    assert f"] {key}:" in line and line.isprintable()


def test_paths_are_one_line_and_not_empty(tmp_path: Path) -> None:
    for text in ("", "a\nb", "a\tb"):
        assert "] data.path:" in refused(TINY, f"data.path={text}")[0]
    assert "] data.path:" in refused(recipe_file(tmp_path, "data: {path: ''}\n"))[0]


@pytest.mark.parametrize("text", ["####", "", "# a", "~", "Null", "/data/set #1.jsonl"])
def test_a_comment_that_may_have_been_text_is_refused(text: str, tmp_path: Path) -> None:
    for section, key in (("data", "path"), ("reward", "answer_marker")):
        (line,) = refused(recipe_file(tmp_path, f"{section}:\n  {key}: {text}\n"))
        assert f"{section}.{key}" in line and "mine.yaml:3" in line
        assert value_of(load(recipe_file(tmp_path, f"{section}:\n  {key}: '{text or 'a'}'\n")), f"{section}.{key}")
    assert load(recipe_file(tmp_path, "data:\n  path: a  # a comment\n")).data.path == tmp_path / "a"


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("run: {name: '\u00e4'}\n".encode("latin-1"), 2, "UTF-8"),
        ("# a\r\n# \u00e4\r\n".encode("latin-1"), 3, "UTF-8"),
        (b"run:\n\tname: a\n", 3, "tab"),
        (b"run: {name: a}\n# b\nrun: {seed: 1}\n", 4, "twice"),
        (b"run:\n  seed: 1\n  seed: 2\n", 4, "twice"),
        (b"run:\n  ? seed\n  : 1\n  \"seed\": 2\n", 5, "twice"),
        (b"run: {name: a}\n---\nrun: {name: b}\n", 3, "document"),
        (b"run: {name: a}\n...\nrun: {name: b}\n", 4, "document"),
        (b"run: &a {name: a}\nplacement: {<<: *a}\n", 3, "<<"),
        (b"run: {name: *a}\n", 2, "alias"),
        (b"run: &a {name: *a}\n", 2, "itself"),
        (b"run: {name: !!str 1}\n", 2, "tag"),
        (b"run: {name: !python/object:os.system a}\n", 2, "tag"),
        (b"run: {[a]: b}\n", 2, "key"),
        (b"run: {name: a\n", 3, ""),
        (b"run: {name: 'a\n", 3, ""),
        (b"run: {name: a\x00b}\n", 2, ""),
        (b"run: {name: a\x08b}\n", 2, ""),
        ("run: {name: 'a\u2028b'}\n".encode(), 2, "U+2028"),
        ("run: {name: 'a\u0085b'}\n".encode(), 2, "U+0085"),
        (b"run: {name: @a}\n", 2, "quote"),
        (b"run: {name: a: b}\n", 2, ""),
        (b"run:\n  name: a: b\n", 3, "quote"),
        (b"data:\n  options: " + b"[" * 3000 + b"]" * 3000, 3, "deep"),
        (b"%YAML 3.0\n---\n", 0, ""),
    ],
)  # fmt: skip
def test_files_that_are_not_read_name_the_line(text: bytes, line: int, word: str, tmp_path: Path) -> None:
    (reported,) = refused(recipe_file(tmp_path, text))
    assert word in reported
    assert "mine.yaml:" in reported and (not line or f"mine.yaml:{line}:" in reported), reported


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp037"])
def test_other_encodings_are_one_sentence(coding: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(TINY.read_text().encode(coding))
    (line,) = refused(path)
    assert "UTF-8" in line and "mine.yaml:" in line


def test_a_byte_order_mark_and_carriage_returns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TINY.read_bytes().replace(b"\n", b"\r\n"))
    shipped = f"tokenizer.path={TINY.parent / 'tokenizers' / 'arithmetic.model'}"
    assert load(path, [shipped]) == load(TINY, [shipped])


def test_an_anchor_is_the_value_again(tmp_path: Path) -> None:
    recipe = load(recipe_file(tmp_path, "optimizer: {betas: &b [0.8, 0.9]}\ncold_start: {betas: *b}\n"))
    assert recipe.cold_start is not None and recipe.cold_start.betas == recipe.optimizer.betas == (0.8, 0.9)
    many = "data:\n  options:\n    a0: &a0 [x, x]\n"
    many += "".join(f"    a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
    assert "mine.yaml" in refused(recipe_file(tmp_path, many))[0]


ITEMS = (
    "", "=", "=1", "a", ".=1", "run.=1", "run..seed=1", ".run.seed=1", "run.seed.x=1", "-a=1", "run.seed =1",
    " run.seed=1", "run[seed]=1", "objective.correction.0=tis", "a\x00b=1", "\ud800=1", "run={seed: 1}x",
    "run={{seed: 1}", "model=null", "run=null", "=" * 9, "a." * 5000 + "b=1", "data.options." + "a." * 3000 + "b=1",
    "batch=[1]", "objective.trust=a\nb", "objective.preset=a\nb", "objective.preset=:", "objective.preset=.a:b",
    "objective.preset=a..b:c", "objective.preset=/:a.py:b", "objective.preset=" + "a" * 5000 + ".py:b",
    "model.architecture.model_type=\U00012544", "model.architecture.model_type=" + "a" * 5000,
    "model.architecture.model_type=7", "rollout.length_stages=[{a: 1}]", "rollout.length_stages=[1]",
)  # fmt: skip


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: ascii(item)[:20])
def test_overrides_that_name_nothing_are_one_sentence(item: str) -> None:
    lines = refused(TINY, item)
    assert all(line.isprintable() and len(line) < 600 for line in lines), lines


def test_python_values_obey_the_rule_too() -> None:
    from gspo_megatron.config.loading import parse

    for key, value in (("max_steps", True), ("ranks", False), ("max_steps", "yes"), ("aux_loss_coefficient", True)):
        tree = load(TINY).model_dump(mode="json")
        tree["trainer"][key] = value
        with pytest.raises(RecipeError) as caught:
            parse(tree)
        assert [finding.key for finding in caught.value.findings] == [f"trainer.{key}"]


def test_a_recipe_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    assert "recipe" in refused(tmp_path)[0]
    assert "recipe" in refused(Path("a" * 5000))[0]
    assert "recipe" in refused(Path("a\0b"))[0]
    for base in ("[a]", "{a: b}", "''", '"a\\u0008"', "~", "../" * 3000):
        path = tmp_path / "own.yaml"
        path.write_text(f"base: {base}\n")
        assert refused(path)
    path.write_bytes(b"#" * (2 << 20))
    assert "own.yaml" in refused(path)[0]


def test_resolved_recipes_of_the_previous_writer_load(tmp_path: Path) -> None:
    recipe = load_resolved(OLD)
    assert recipe.tokenizer.system_prompt == "costs ${x}, 010 and \u00a0\t\n\\boxed{}"
    assert recipe.environment is not None and recipe.environment.reply.startswith("\n<tool_response>\n")
    assert recipe.rollout.thinking is not None and recipe.rollout.thinking.closing.endswith("\n</think>.\n\n")
    assert (recipe.optimizer.lr, recipe.objective.correction, recipe.data.options["operators"]) == (
        1e-7,
        ("tis",),
        ["+"],
    )
    save_resolved(recipe, tmp_path / "recipe.yaml")
    assert load_resolved(tmp_path / "recipe.yaml") == recipe
