"""tools/prepare_prompts.py on rows shaped like the published sets, and on what else a file can hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.data.problem_lines import read_problems
from gspo_megatron.types import Problem
from tools.prepare_prompts import INSTRUCTIONS, WRAPPINGS, main

CASES = int(os.environ.get("GSPO_FUZZ", "1000")) // 10
BEFORE, AFTER = WRAPPINGS[0]
DAPO = {"prompt": [{"role": "user", "content": f"{BEFORE}What is 1+1?{AFTER}"}], "reward_model": {"ground_truth": "2"}}
AIME = {"ID": "2024-I-1", "Problem": "Find x.", "Solution": "long", "Answer": 204}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "And 2 + 2?"}
REPLY = {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def run(directory: Path, content: str | bytes, *options: str) -> tuple[int, list[Problem]]:
    """Exit status of the script on a file of this content, and the problems that a recipe reads from its target."""
    source, target = directory / "source", directory / "target.jsonl"
    source.write_bytes(content.encode() if isinstance(content, str) else content)
    target.unlink(missing_ok=True)
    status = main([str(source), str(target), *options])
    return status, list(read_problems(DataSection(path=target)).values()) if status == 0 else []


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_the_published_shapes_are_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (found,) = run(tmp_path, jsonl(DAPO, DAPO))
    assert (found.question, found.answer) == (f"{BEFORE}What is 1+1?{AFTER}", "2")
    assert "1 problems of 2 rows" in (said := capsys.readouterr().out) and "dropped: 1 repeated" in said
    _, (found,) = run(tmp_path, jsonl(AIME), "--instruction", "boxed")
    assert (found.question, found.answer) == ("Find x." + INSTRUCTIONS["boxed"], "204")
    _, (found,) = run(tmp_path, jsonl(DAPO), "--instruction", "boxed")
    assert found.question == "What is 1+1?" + INSTRUCTIONS["boxed"]


def test_a_problem_with_two_answers_is_dropped_for_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "q", "answer": a} for a in ("1", "2", "1")] + [{"question": "p", "answer": "3"}]
    _, (found,) = run(tmp_path, jsonl(*rows))
    assert (found.question, found.answer) == ("p", "3") and "3 with two answers" in capsys.readouterr().out


def test_pass_rates_come_in_three_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: list[object] = [0.875, "7/8", [1, 0.5, True, 0], "0", 1.5, "1/0", None, [], "x"]
    rows = [{"question": str(i), "answer": "1", "a": {"rate": value}} for i, value in enumerate(values)]
    _, found = run(tmp_path, jsonl(*rows), "--pass-rate-key", "a.rate")
    assert [one.pass_rate for one in found] == [0.875, 0.875, 0.5, 0.0]
    said = capsys.readouterr().out
    assert "5 that are no problem" in said and "source line 5 has `a.rate`=1.5; write a share from 0 to 1" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "SOURCE: .*source holds no row"),
        ('{"text": "x"}', "--prompt-key: none of prompt, .* is a field of .*source, which has text; name the field"),
        ('{"question": "x", "solution": "1"}', "--answer-key: none of answer, "),
        ('{"question": "", "answer": null}', "SOURCE: no row of .*source is a problem; .*line 1 has `answer`=None"),
        ('{"question": "1", "answer": "1"}\n\n{"question": "1", answer": 1}', "line 3 is not JSON: .* column 19"),
        ('{"question": "1", "answer": "1"}\n[1]', "source line 2 is no object"),
        ('[{"question": "1", "answer": "1"}, 7]', "source item 2 is no object"),
        ('{"question": "\u00e9", "answer": "1"}'.encode("latin-1"), "source line 1 is not UTF-8"),
        ('{"question": "\\ud800", "answer": "1"}', "source line 1 holds half of a surrogate pair"),
        ('{"question": "q", "answer": ' + "7" * 5000 + "}", "source line 1 holds a number that cannot be read"),
        ('{"question": "q", "answer": NaN}', "source line 1 holds a number that cannot be read: NaN"),
        ('{"question": "q", "answer": 1e400}', "source line 1 holds a number that cannot be read: 1e400"),
        ('{"question": "q", "answer": ' + "[" * 2000 + "]" * 2000 + "}", "source line 1 is nested too deeply"),
    ],
)  # fmt: skip
def test_what_cannot_be_turned_is_said_with_its_line(
    content: str | bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, content)[0] == 2 and not (tmp_path / "target.jsonl").exists()
    error = capsys.readouterr().err
    assert re.search(said, error), error


@pytest.mark.parametrize(
    ("gold", "read"),
    [
        (["3"], "3"), (["3", "3"], "3"), ([["3"]], "3"), (["3", "-3"], None), ([], None), ([None], None),
        ({"ground_truth": ["5"]}, "5"), ({"ground_truth": None}, None), ({"value": 1}, None), (True, None), (" ", None),
        (204, "204"), ("3 + 4 = 7.\n#### 7", "7"), ("#### 7\nso\n####  1,000 ", "1,000"),
    ],
)  # fmt: skip
def test_a_gold_is_one_text(gold: Any, read: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two golds in a list nobody said which counts: the row is left out, in words."""
    _, found = run(tmp_path, jsonl({"question": "p", "answer": "7"}, {"question": "q", "answer": gold}))
    assert [one.answer for one in found] == ["7"] + [read] * (read is not None)
    assert ("source line 2 has `answer" in capsys.readouterr().out) is (read is None)


@pytest.mark.parametrize("number", ["0.00001", "1e16", "1e22", "0.1", "25.0", "6.63e-34"])
def test_a_number_keeps_its_text(number: str, tmp_path: Path) -> None:
    _, (found,) = run(tmp_path, f'{{"question": "q", "answer": {number}}}')
    assert found.answer == number


def test_a_column_of_whole_numbers_with_gaps_is_one_of_whole_numbers(tmp_path: Path) -> None:
    """Tables hold it as floats; the first row without an answer does not hide the field."""
    rows = [{"Problem": "a", "Answer": None}, {"Problem": "b", "Answer": 204.0}, {"Problem": "c", "Answer": 0.5}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows")
    _, found = run(tmp_path, (tmp_path / "rows").read_bytes())
    assert [one.answer for one in found] == ["204", "0.5"]


@pytest.mark.parametrize("key", ["prompt", "messages", "query"])
def test_a_conversation_keeps_its_system_prompt_earlier_turns_and_tools(key: str, tmp_path: Path) -> None:
    turns = [SYSTEM, USER, REPLY, {"role": "user", "content": "So?"}]
    _, (found,) = run(tmp_path, jsonl({key: turns, "answer": "4", "tools": [TOOL]}))
    assert found.messages == tuple(turns) and found.question == "So?" and found.tools == (TOOL,)
    _, (found,) = run(tmp_path, jsonl({key: turns, "answer": "4"}), "--instruction", "boxed")
    assert found.messages[:3] == tuple(turns[:3]) and found.question == "So?" + INSTRUCTIONS["boxed"]


def test_other_conversations_are_no_repetition(tmp_path: Path) -> None:
    rows = [
        {"prompt": turns, "answer": str(n)} for n, turns in enumerate([[USER], [SYSTEM, USER], [USER, REPLY, USER]])
    ]
    assert len(run(tmp_path, jsonl(*rows))[1]) == 3


def test_a_conversation_that_ends_in_an_answer_is_left_out_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (found,) = run(tmp_path, jsonl({"prompt": [USER], "answer": "4"}, {"prompt": [USER, REPLY], "answer": "4"}))
    assert found.question == USER["content"]
    said = capsys.readouterr().out
    assert "dropped: 1 that are no problem" in said
    assert "source line 2 has messages that end in an assistant's turn" in said


@pytest.mark.parametrize("same", [True, False])
def test_a_file_that_exists_is_not_replaced(same: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / ("a.jsonl" if same else "b.jsonl")
    target.write_text("of somebody")
    source.write_text(jsonl(AIME))
    before = target.read_text()
    assert main([str(source), str(target)]) == 2 and target.read_text() == before
    assert f"TARGET: {target} exists" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["/proc/x/y", "/dev/null/x", "/"])
def test_a_target_that_cannot_be_written_is_a_sentence(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source").write_text(jsonl(AIME))
    assert main([str(tmp_path / "source"), target]) == 2
    assert f"TARGET: {target} " in capsys.readouterr().err


@pytest.mark.parametrize("row", [{"answer": "1"}, {"question": "q"}])
def test_a_key_that_no_row_has_is_said(row: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "--answer-key" if "question" in row else "--prompt-key"
    assert run(tmp_path, jsonl({"question": "q", "answer": "1", **row}), key, "a.b")[0] == 2
    assert f"{key}: no row of {tmp_path / 'source'} has `a.b`" in capsys.readouterr().err


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
turns = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts})
golds = texts | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
odd = st.none() | st.booleans() | st.lists(texts | st.none(), max_size=3) | st.just({}) | st.just("")
rows = st.fixed_dictionaries(
    {"prompt": texts | st.lists(turns, max_size=4) | odd, "answer": golds | golds | odd},
    optional={"source": texts, "pass_rate": golds, "tools": st.just([TOOL])},
)


@settings(max_examples=CASES, deadline=None, print_blob=True)
@given(rows=st.lists(rows, min_size=1, max_size=6))
def test_the_script_and_the_recipe_read_the_same_problems(rows: list[dict[str, Any]]) -> None:
    """Row by row: what `data.path` would read of a row is what it reads of the written file, or neither reads it."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        status, found = run(place, jsonl(*rows))
        kept = {one.id: one.answer for one in found}
        assert status in (0, 2) and (kept or status == 2)
        for row in rows:
            plain = {name: value for name, value in row.items() if name not in ("source", "pass_rate")}
            (place / "row").write_text(json.dumps(plain))
            try:
                (one,) = read_problems(DataSection(path=place / "row")).values()
            except ValueError:
                continue
            same = [r for r in rows if r["prompt"] == row["prompt"]]
            assert one.id not in kept or kept[one.id] == one.answer
            assert one.id in kept or len(same) > 1, "a problem was lost"


def test_it_is_a_script(tmp_path: Path) -> None:
    source, target = tmp_path / "aime.json", tmp_path / "data" / "aime.jsonl"
    source.write_text(json.dumps([AIME, {**AIME, "Problem": "Find y.", "Answer": 25}]))
    command = [sys.executable, "tools/prepare_prompts.py", str(source), str(target), "--source", "aime"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 problems of 2 rows" in done.stdout
    assert [problem.answer for problem in read_problems(DataSection(path=target)).values()] == ["204", "25"]
    assert {problem.source for problem in read_problems(DataSection(path=target)).values()} == {"aime"}
    command[2] = str(tmp_path / "none")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
