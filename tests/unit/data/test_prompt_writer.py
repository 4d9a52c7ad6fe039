"""Prompts by the chat template and by a user's own rendering; wrong ones are refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.cli import main
from gspo_megatron.config.task_sections import TokenizerSection
from gspo_megatron.data.problem_lines import make_problem
from gspo_megatron.data.prompt_writer import PromptWriter
from gspo_megatron.data.tokenizers import load_tokenizer
from tests.places import ROOT
from tests.tokenizer_directory import save_tokenizer

TEMPLATE = (
    "{% if tools %}<{{ tools | map(attribute='name') | join(',') }}>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
    "({{ c.function.arguments.x }}){% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
SYSTEM = {"role": "system", "content": "S"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 7}'}}]}


def write(directory: Path, line: dict[str, Any], **section: Any) -> str:
    """The text of a prompt."""
    chosen = TokenizerSection(path=directory, **section)
    tokenizer = load_tokenizer(chosen, None)
    problem = make_problem(line, "line 1", "data.path", needs_answer=False)
    return tokenizer.decode(PromptWriter(chosen, tokenizer).encode(problem))


def test_the_template_gets_system_turns_and_tools(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path, TEMPLATE)
    tools = [{"name": "add"}, {"name": "sub"}]
    assert write(directory, {"prompt": "a"}) == "[user]a[assistant]"
    assert write(directory, {"prompt": TURNS}) == "[user]a[assistant]b[user]c[assistant]"
    assert write(directory, {"prompt": [SYSTEM, *TURNS[:1]]}) == "[system]S[user]a[assistant]"
    assert write(directory, {"prompt": "a", "tools": tools}) == "<add,sub>[user]a[assistant]"
    called = [TURNS[0], CALL, {"role": "tool", "content": "8"}]
    assert write(directory, {"messages": called}) == "[user]a[assistant](7)[tool]8[assistant]"


def test_a_line_s_own_system_message_comes_before_the_recipe_s(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path, TEMPLATE)
    assert write(directory, {"prompt": "a"}, system_prompt="R") == "[system]R[user]a[assistant]"
    assert write(directory, {"prompt": [SYSTEM, TURNS[0]]}, system_prompt="R") == "[system]S[user]a[assistant]"
    rendering = f"{ROOT}/recipes/renderings/one_example.py:render"
    for prompt, system in (("a", "R"), ([SYSTEM, TURNS[0]], "S")):
        shown = write(directory, {"prompt": prompt}, system_prompt="R", rendering=rendering)
        assert shown == f"[system]{system}[user]Calculate 12 + 30.[assistant]12 + 30 = 42[user]a[assistant]"


def test_a_sentencepiece_tokenizer_has_no_template_for_a_conversation() -> None:
    section = TokenizerSection(kind="sentencepiece", path=ROOT / "recipes/tokenizers/arithmetic.model")
    writer = PromptWriter(section, load_tokenizer(section, None))
    problem = make_problem({"prompt": [SYSTEM, TURNS[0]]}, "line 1", "data.path", needs_answer=False)
    with pytest.raises(ValueError, match="a sentencepiece tokenizer has no chat template"):
        writer.encode(problem)


def own(directory: Path, code: str) -> str:
    (directory / "mine.py").write_text(code)
    return f"{directory}/mine.py:render"


def test_a_rendering_returns_a_text_ids_or_messages(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path / "tokenizer", template=None)
    line = {"prompt": "a", "hint": "h"}
    for number, (body, shown) in enumerate(
        [("return f\"Q: {line['prompt']} ({line['hint']})\"", "Q: a (h)"), ("return chat.encode('x') * 3", "xxx")]
    ):
        (tmp_path / str(number)).mkdir()
        rendering = own(tmp_path / str(number), f"def render(line, chat): {body}")
        assert write(directory, line, rendering=rendering) == shown
    with_template = save_tokenizer(tmp_path / "chat", TEMPLATE)
    rendering = own(tmp_path, "def render(line, chat): return chat.apply(chat.messages) + 'So'")
    assert write(with_template, line, rendering=rendering) == "[user]a[assistant]So"


WRONG = {
    "render = 3": "is a int; name a function render(line, chat)",
    "class render:\n    pass": "is the class render",
    "def render(line): return 'a'": "cannot be called as render(line, chat)",
    "def render(line, chat): yield 'a'": "is a generator",
    "async def render(line, chat): return 'a'": "is `async def`",
    "def render(line, chat): return None": "returned a NoneType; return a text",
    "def render(line, chat): return ''": "returned nothing",
    "def render(line, chat): return []": "returned nothing",
    "def render(line, chat): return [1, 'a']": "returned a list with 'a'",
    "def render(line, chat): return [300]": "returned the id 300, the vocabulary has 257",
    "def render(line, chat): return [-1]": "returned the id -1",
    "def render(line, chat): return '\\ud800'": "half of a surrogate pair",
    "def render(line, chat): return line['question']": "raised KeyError: 'question'",
    "def render(line, chat): line['prompt'] = 'x'; return 'x'": "changed the line",
    "import itertools\nN = itertools.count()\ndef render(line, chat): return str(next(N))": "another prompt for the",
}


@pytest.mark.parametrize("code", WRONG)
def test_a_wrong_rendering_is_refused_in_a_sentence(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", own(tmp_path, code), "--hook", "rendering"]) == 2
    error = capsys.readouterr().err
    assert WRONG[code] in error and "Traceback" not in error
