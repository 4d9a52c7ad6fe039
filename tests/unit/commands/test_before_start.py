"""What can be known before a process starts is refused before it: exit code 2, one sentence, no run directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gspo_megatron import cli
from gspo_megatron.data.prompt_check import check_prompts
from gspo_megatron.models import load_recipe
from gspo_megatron.types import Finding
from tests.places import ROOT
from tests.tokenizer_directory import TEMPLATE, save_tokenizer

TINY = ROOT / "recipes/tiny_moe.yaml"
JSONL = "data={source: jsonl, path: DIR/p.jsonl, held_out: 8, task: null}"
START = [JSONL, "data.options={}", "reward.name=math_verify", "evaluation.problems=null", "cold_start=null"]
GOOD = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(40)]


OWN = "cold_start={steps: 9, batch_size: 4, lr: 0.1, path: DIR/"


def write(file: Path, lines: list[object]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def fill(directory: Path) -> None:
    write(directory / "p.jsonl", [*GOOD])
    write(directory / "held.jsonl", [{"prompt": "9 + 9", "answer": "18"}])
    write(directory / "fields.jsonl", [{"question": "1 + 1", "solution": "2"}])
    write(directory / "long.jsonl", [{"prompt": "1" * 50 + str(i), "answer": "1"} for i in range(40)])
    write(directory / "cyrillic.jsonl", [{"prompt": f"\u0447\u0442\u043e {i}", "answer": "1"} for i in range(40)])
    write(directory / "products.jsonl", [{"prompt": f"{i} * 2", "answer": "1"} for i in range(40)])
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "1" * 60}]
    write(directory / "own_long.jsonl", [{"messages": turns}] * 2)
    (directory / "empty.jsonl").write_text("\n\n")
    (directory / "broken.model").write_text("version https://git-lfs")
    if not (directory / "linked.jsonl").is_symlink():
        (directory / "linked.jsonl").symlink_to("p.jsonl")


REFUSED = {
    "missing data": (["data.path=DIR/none.jsonl"], "data.path: DIR/none.jsonl does not exist here"),
    "missing held-out data": (["data.held_out_path=DIR/none.jsonl"], "data.held_out_path: DIR/none.jsonl does not"),
    "empty data": (["data.path=DIR/empty.jsonl"], "data.path: DIR/empty.jsonl holds no problem"),
    "wrong fields": (["data.path=DIR/fields.jsonl"], "DIR/fields.jsonl line 1 has no `prompt`"),
    "too much held out": (["data.held_out=40"], "data.held_out: all 40 questions of DIR/p.jsonl are held out"),
    "held out what is trained on": (["data.held_out_path=DIR/linked.jsonl"], "DIR/linked.jsonl is data.path"),
    "too long": (["data.path=DIR/long.jsonl"], "rollout.max_prompt_tokens: none of 32 problems in a row is usable"),
    "characters": (["data.path=DIR/cyrillic.jsonl"], "none of 32 problems in a row is usable (limit 32 tokens, 32"),
    "evaluation": (["evaluation.problems=9"], "9 problems are set, but data.held_out=8 are held out"),
    "evaluation of a file": (["data.held_out_path=DIR/held.jsonl", "evaluation.problems=9"], "9 problems are set, but"),
    "missing tokenizer": (["tokenizer.path=DIR/none.model"], "tokenizer.path: DIR/none.model does not exist here"),
    "no tokenizer": (["tokenizer.path=null"], "tokenizer.path: is not set and there is no model.path"),
    "broken tokenizer": (["tokenizer.path=DIR/broken.model"], "DIR/broken.model cannot be loaded"),
    "vocabulary": (["model.architecture.vocab_size=64"], "has 93 ids, and the model vocab_size=64 rows"),
    "unused setting": (["tokenizer.system_prompt=Be brief."], "system_prompt is for a chat template, and kind=sent"),
    "demonstrations": (["cold_start={demonstrations: column_addition, steps: 9, batch_size: 4, lr: 0.1}",
                        "data.path=DIR/products.jsonl"], "cold_start.demonstrations: demonstrations are sums"),
    "missing own demonstrations": ([OWN + "none.jsonl}"], "cold_start.path: DIR/none.jsonl does not exist here"),
    "own demonstrations": ([OWN + "fields.jsonl}"], "cold_start.path: DIR/fields.jsonl line 1 has no list `messages`"),
    "long own demonstrations": ([OWN + "own_long.jsonl}"], "cold_start.path: all 2 demonstrations have more than 60"),
}  # fmt: skip
ELSEWHERE = {"missing own demonstrations", "missing data", "missing held-out data", "missing tokenizer"}
"""What a plan cannot know: the files may be on the machine where the run starts."""


def run(command: str, directory: Path, overrides: list[str]) -> int:
    fill(directory)
    place = f"run.directory={directory}/run"
    return cli.main([command, str(TINY), place, *(o.replace("DIR", str(directory)) for o in [*START, *overrides])])


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_is_refused_before_anything_starts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gspo_megatron.commands.train_run.run_roles", lambda *_: pytest.fail("a process was started"))
    overrides, sentence = REFUSED[name]
    assert run("train", tmp_path, overrides) == 2
    said = capsys.readouterr().err
    assert sentence.replace("DIR", str(tmp_path)) in said
    assert len([line for line in said.splitlines() if line.startswith("error")]) == 1, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_says_the_same_of_what_is_here(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, sentence = REFUSED[name]
    code = run("plan", tmp_path, overrides)
    caught = capsys.readouterr()
    if name in ELSEWHERE:
        assert code == 0 and "is not found here" in caught.out
    else:
        assert code == 2 and sentence.replace("DIR", str(tmp_path)) in caught.out + caught.err


def test_a_small_set_runs_without_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`evaluation.problems` is all that fit by default: one held-out problem is a set too."""
    assert run("plan", tmp_path, ["data.held_out_path=DIR/held.jsonl"]) == 0
    assert "error" not in capsys.readouterr().out


def test_prompts_that_are_left_out_are_counted_in_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    lines: list[object] = [*GOOD[:12], *({"prompt": "1" * 60 + str(i), "answer": "1"} for i in range(28))]
    write(tmp_path / "mixed.jsonl", lines)
    overrides = ["data.path=DIR/mixed.jsonl", "data.held_out_path=DIR/held.jsonl"]
    assert run("plan", tmp_path, overrides) == 0
    assert "warning [prompts-left-out] data: 28 of the first 40 prompts" in capsys.readouterr().out
    assert run("plan", tmp_path, [*overrides, "acknowledge.prompts-left-out=known"]) == 0
    said = capsys.readouterr().out
    assert "info [prompts-left-out]" in said and "acknowledged-nothing" not in said


def findings_of(directory: Path, *overrides: str) -> list[Finding]:
    """The findings about a Hugging Face directory, read in this process."""
    fill(directory.parent)
    words = [*START, "tokenizer.kind=huggingface", f"tokenizer.path={directory}", "model.architecture.vocab_size=512"]
    words += ["rollout.max_prompt_tokens=100", *overrides]
    return check_prompts(load_recipe(TINY, [word.replace("DIR", str(directory.parent)) for word in words]), True)


DIRECTORIES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "no vocabulary": (lambda d: (d / "tokenizer.json").unlink(), (), "has no vocabulary (tokenizer.json, "),
    "no configuration": (lambda d: (d / "tokenizer_config.json").unlink(), (), "has no tokenizer_config.json"),
    "a pointer": (lambda d: (d / "tokenizer.json").write_text("version https://git-lfs"), (), "cannot be loaded ("),
    "a broken configuration": (lambda d: (d / "tokenizer_config.json").write_text("{"), (), "cannot be loaded ("),
    "no template": (lambda d: (d / "chat_template.jinja").unlink(), (), "has no chat template"),
    "a template without syntax": (lambda d: save_tokenizer(d, "{% for %}"), (), "the chat template refuses messages"),
    "a template that wants a system prompt": (
        lambda d: save_tokenizer(d, "{% if messages[0].role != 'system' %}{{ raise_exception('no role') }}{% endif %}"),
        (), "refuses messages of user: no role; correct the template, or set tokenizer.system_prompt"),
    "a template that wants none": (
        lambda d: save_tokenizer(d, "{% if messages[0].role != 'user' %}{{ raise_exception('user!') }}{% endif %}"),
        ("tokenizer.system_prompt=x",), "the chat template refuses messages of system, user: user!"),
    "a template that adds to a number": (
        lambda d: save_tokenizer(d, "{{ 1 + messages }}"), (), "the chat template refuses messages of user: "),
    "an unread system prompt": (
        lambda d: save_tokenizer(d, "{{ messages[-1].content }}"), ("tokenizer.system_prompt=x",),
        "tokenizer.system_prompt: is set, but the chat template"),
    "an unread switch": (
        lambda d: save_tokenizer(d, "{{ messages[-1].content }}"), ("tokenizer.enable_thinking=false",),
        "tokenizer.enable_thinking: is set, but the chat template"),
    "a template without the question": (
        lambda d: save_tokenizer(d, "[user][assistant]"), (), "leaves out the user's message, or a part"),
    "a template that cuts the question": (
        lambda d: save_tokenizer(d, "{{ messages[-1].content[:12] }}"), (), "67890?' it makes 'What is 1234"),
    "a rendering without the question": (
        lambda d: (d.parent / "same.py").write_text("def render(line, chat):\n    return 'Go on.'\n"),
        ("tokenizer.rendering=DIR/same.py:render",), "tokenizer.rendering: 31 of the first 32 prompts have the very"),
    "a rendering that ends Python": (
        lambda d: (d.parent / "ends.py").write_text("def render(line, chat):\n    raise SystemExit(0)\n"),
        ("tokenizer.rendering=DIR/ends.py:render",), "the rendering raised SystemExit"),
    "a stop id of config.json": (
        lambda d: (d / "config.json").write_text('{"eos_token_id": 300}'), (), "config.json: eos_token_id=300 is no"),
    "a stop id of the model": (
        lambda d: (d.parent / "m").mkdir() or (d.parent / "m/config.json").write_text(json.dumps(
            {"model_type": "qwen3", "vocab_size": 512, "eos_token_id": [257, 400]})),
        ("model.architecture={}", "model.path=DIR/m"), "m/config.json: eos_token_id=400 is no id of the tokenizer"),
    "too few rows": (lambda d: d, ("model.architecture.vocab_size=257",), "has 258 ids, and the model vocab_size=257"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_that_cannot_be_used_is_refused(name: str, tmp_path: Path) -> None:
    spoil, overrides, sentence = DIRECTORIES[name]
    directory = save_tokenizer(tmp_path / "tokenizer")
    spoil(directory)
    errors = [str(finding) for finding in findings_of(directory, *overrides) if finding.severity == "error"]
    assert len(errors) == 1 and sentence in errors[0], errors


SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
KNOWN = "{% for m in messages if m.role in ['system', 'user'] %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
LOST = {
    "an unknown role": (KNOWN, "developer", (), "warning [message-left-out] tokenizer.path", "role=developer"),
    "a first message": (
        KNOWN.replace("messages if", "messages[-1:] if"), "system", (), "warning [message-left-out]", "role=system"),
    "tools": (KNOWN, "system", ("tools",), "error [tools-left-out] data.tools_key", "with and without"),
    "a misspelt key": (KNOWN, "system", ("tools", "data.tools_key=tolls"), "warning [tools-missing]", "has `tolls`"),
    "nothing": (KNOWN + "{% if tools %}[tools]{% endif %}", "system", ("tools",), "", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_what_the_template_leaves_out_of_the_problems_is_said(name: str, tmp_path: Path) -> None:
    template, role, (*more,), head, sentence = LOST[name]
    first = {"role": role, "content": "Be brief."}
    chats = [[first, {"role": "user", "content": f"{i} + 1"}] for i in range(40)]
    tools = {"tools": [SEARCH]} if more else {}
    write(tmp_path / "chats.jsonl", [{"messages": chat, "answer": "1"} | tools for chat in chats])
    words = ["data.path=DIR/chats.jsonl", *more[1:]]
    found = [str(one) for one in findings_of(save_tokenizer(tmp_path / "tokenizer", template), *words)]
    assert [one.startswith(head) and sentence in one for one in found] == ([True] if head else []), found


@pytest.mark.parametrize("named", [[], "<end>", -1, 999_999])
def test_a_wrong_stop_id_is_refused(named: object, tmp_path: Path) -> None:
    found = findings_of(save_tokenizer(tmp_path / "tokenizer", stop_ids=named))
    assert [(finding.code, finding.severity) for finding in found] == [("stop-id-wrong", "error")]


def test_a_turn_end_that_stops_nothing_is_a_warning(tmp_path: Path) -> None:
    """A base model that was tuned to chat, with the configuration of the base model."""
    template = "{% for m in messages %}{{ m.content }}<pad>{% endfor %}"
    (found,) = findings_of(save_tokenizer(tmp_path / "tokenizer", template))
    assert (found.code, found.severity) == ("turn-end-not-a-stop", "warning")
    assert "ends a turn with <pad> (id 257), which is none of the ids that end a response: 256" in found.message
    assert findings_of(save_tokenizer(tmp_path / "tokenizer", template, stop_ids=[256, 257])) == []


@pytest.mark.parametrize("text", ["[]", "3", "{", "\xff", "[" * 9999 + "]" * 9999])
def test_a_broken_generation_config_is_one_refusal(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "tests/data/model", tmp_path / "m", ignore=shutil.ignore_patterns("broken"))
    (save_tokenizer(tmp_path / "m") / "generation_config.json").write_text(text, encoding="latin-1")
    overrides = ["tokenizer.kind=huggingface", "tokenizer.path=null", "model.path=DIR/m", "model.architecture={}"]
    assert run("plan", tmp_path, overrides) == 2
    said = [line for line in capsys.readouterr().out.splitlines() if "generation_config.json" in line]
    assert len(said) == 1 and said[0].startswith("error [stop-id-wrong] tokenizer.path: ")


def test_prompts_of_which_most_are_alike_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "cut.py").write_text("def render(line, chat):\n    return line['prompt'][:1]\n")
    (found,) = findings_of(save_tokenizer(tmp_path / "tokenizer"), f"tokenizer.rendering={tmp_path}/cut.py:render")
    assert (found.code, found.severity) == ("prompts-alike", "warning") and "of the first 32 prompts" in found.message


def test_a_turn_end_that_is_no_token_is_a_warning(tmp_path: Path) -> None:
    """The template of one model in the directory of another."""
    template = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
    (found,) = findings_of(save_tokenizer(tmp_path / "tokenizer", template))
    assert (found.code, found.severity) == ("turn-end-not-a-stop", "warning")
    assert "ends a turn with <|im_end|> (no token of the tokenizer), which is none" in found.message


def test_settings_that_the_template_reads_are_fine(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path / "tokenizer", TEMPLATE)
    for switch in ("true", "false"):
        overrides = ("tokenizer.system_prompt=Be brief.", f"tokenizer.enable_thinking={switch}")
        assert findings_of(directory, *overrides) == []


def test_a_directory_is_read_apart_from_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its library is loaded in a process of its own, which imports what this process would."""
    save_tokenizer(tmp_path / "tokenizer", "{{ messages[-1].content }}")
    overrides = ["tokenizer.kind=huggingface", "tokenizer.path=DIR/tokenizer", "tokenizer.enable_thinking=false"]
    assert run("plan", tmp_path, [*overrides, "model.architecture.vocab_size=512"]) == 2
    assert "error [template-setting-unused] tokenizer.enable_thinking" in capsys.readouterr().out
