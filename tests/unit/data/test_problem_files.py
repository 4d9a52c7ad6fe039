"""Files of problems in every format: what is read, what is refused with its place, which questions are one."""

from __future__ import annotations

import json
import os
import pickle
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.data import json_lines
from gspo_megatron.data.problem_lines import read_problems
from gspo_megatron.data.problems import FileProblems
from gspo_megatron.types import Problem

CASES = int(os.environ.get("GSPO_FUZZ", "1000")) // 10
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is 1 + 1?"}
REPLY = {"role": "assistant", "content": "2"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 1 + 1?", "answer": "2", "n": 3},
    {"prompt": "What is 1 + 2?", "answer": "3", "n": None},
]


def read(path: Path, needs_answer: bool = True, **more: Any) -> list[Problem]:
    return list(read_problems(DataSection(path=path, **more), needs_answer).values())


def save_dataset(directory: Path, rows: list[dict[str, Any]], **state: Any) -> Path:
    """What `Dataset.save_to_disk` of the library `datasets` writes, in two files."""
    directory.mkdir()
    table, names = pyarrow.Table.from_pylist(rows), []
    for number in range(2):
        names.append(f"data-{number:05d}-of-00002.arrow")
        part = table.slice(number * 1, 1 if number == 0 else table.num_rows)
        with pyarrow.ipc.new_stream(str(directory / names[-1]), table.schema) as writer:
            writer.write_table(part)
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], **state}))
    (directory / "dataset_info.json").write_text("{}")
    return directory


def write(path: Path, rows: list[dict[str, Any]], how: str) -> Path:
    if how == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif how == "list":
        path.write_text(json.dumps(rows, indent=1))
    elif how == "windows":
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows) + b"\r\n")
    elif how == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        save_dataset(path, rows)
    return path


@pytest.mark.parametrize("how", ["jsonl", "list", "windows", "parquet", "datasets"])
def test_every_format_gives_the_same_problems(how: str, tmp_path: Path) -> None:
    """The content decides, whatever the name is."""
    found = read(write(tmp_path / "problems.txt", ROWS, how))
    assert [(one.question, one.answer, one.line.get("n")) for one in found] == [
        ("What is 1 + 1?", "2", 3), ("What is 1 + 2?", "3", None)
    ]  # fmt: skip
    assert found[0].id == read(write(tmp_path / "again", ROWS, "jsonl"))[0].id


@pytest.mark.parametrize("how", ["jsonl", "parquet", "datasets"])
def test_messages_keep_system_turns_and_tools(how: str, tmp_path: Path) -> None:
    rows = [{"messages": [SYSTEM, USER, REPLY, {"role": "user", "content": "And 2 + 2?"}], "answer": "4",
             "tools": [TOOL]}]  # fmt: skip
    (found,) = read(write(tmp_path / "p", rows, how))
    assert found.messages == tuple(rows[0]["messages"]) and found.question == "And 2 + 2?"
    assert found.tools[0]["function"]["name"] == "add"


def test_a_conversation_of_one_turn_is_the_prompt(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "What is 1 + 1?"}]}
    prompts = [{"prompt": "What is 1 + 1?"}, {"prompt": [USER]}, {"messages": [parts]}]
    rows = [{**prompt, "answer": "2"} for prompt in prompts]
    (found,) = read(write(tmp_path / "p", rows, "jsonl"))
    assert found.messages == () and found.tools == ()


def test_other_conversations_are_other_problems(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "answer": "2", **more} for prompt, more in (
        (USER["content"], {}), ([SYSTEM, USER], {}), ([USER, REPLY, USER], {}), (USER["content"], {"tools": [TOOL]})
    )]  # fmt: skip
    assert len(read(write(tmp_path / "p", rows, "jsonl"))) == 4


def test_fields_are_found_by_key_and_by_path(tmp_path: Path) -> None:
    rows = [{"Question": "q", "reward_model": {"ground_truth": 7}, "a.b": "x", "extra": {"tools": json.dumps([TOOL])}}]
    path = write(tmp_path / "p", rows, "jsonl")
    keys: dict[str, Any] = {
        "prompt_key": "Question",
        "answer_key": "reward_model.ground_truth",
        "tools_key": "extra.tools",
    }
    (found,) = read(path, **keys)
    assert (found.question, found.answer, found.tools) == ("q", "7", (TOOL,))
    assert read(path, prompt_key="Question", answer_key="a.b")[0].answer == "x"
    with pytest.raises(RecipeError, match=r"line 1 has no `prompt`; .*it has Question, .*\(data.prompt_key names"):
        read(path)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "has messages of no turn"),
        ([USER, REPLY], "has messages that end in an assistant's turn"),
        ([SYSTEM], "has messages that end in a turn of 'system'"),
        (["a"], "has messages of which number 1 is no object"),
        ([{"content": "a"}], "number 1 has role=None"),
        ([{"role": "user"}], r"number 1 \(user\) has content='None'"),
        ([{"role": "user", "content": " "}], r"number 1 \(user\) is empty"),
        ([{"role": "user", "content": 3}], r"has content='3'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "has a part of type 'image_url'"),
        ({"role": "user"}, "has `prompt`="),
        (7, "has `prompt`=7"),
    ],
)
def test_what_no_response_can_follow_is_refused(prompt: Any, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p", [ROWS[0], {"prompt": prompt, "answer": "1"}], "jsonl")
    with pytest.raises(RecipeError, match=f"line 2 .*{said}"):
        read(path)


@pytest.mark.parametrize("tools", ["{", "3", {"a": 1}, [1], 7])
def test_tools_that_are_none_are_refused(tools: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "p", [{"prompt": "p", "answer": "1", "tools": tools}], "jsonl")
    with pytest.raises(RecipeError, match="line 1 has tools"):
        read(path)


BROKEN = {
    "latin-1": ('{"prompt": "p\u00e9", "answer": "1"}'.encode("latin-1"), "is not UTF-8"),
    "UTF-16": ('{"prompt": "p", "answer": "1"}'.encode("utf-16"), "is not UTF-8"),
    "half a pair": (b'{"prompt": "\\ud800", "answer": "1"}', "holds half of a surrogate pair"),
    "half a pair in a key": (b'{"prompt": "p", "answer": "1", "\\uDFff": 1}', "holds half of a surrogate pair"),
    "a long integer": (b'{"prompt": "p", "answer": ' + b"9" * 5000 + b"}", "holds a number that cannot be read"),
    "deep lists": (b'{"prompt": "p", "answer": "1", "x": ' + b"[" * 2000 + b"]" * 2000 + b"}", "is nested too deeply"),
    "deeper objects": (b'{"x":' * 100_000 + b"1" + b"}" * 100_000, "is nested too deeply"),
    "not so deep": (b'{"prompt": "p", "answer": "1", "x": ' + b"[" * 70 + b"]" * 70 + b"}", "is nested too deeply"),
    "a repeated key": (b'{"prompt": "p", "answer": "1", "answer": "2"}', "has the key 'answer' twice"),
    "zeros": (b"\x00" * 100, "is not JSON"),
    "two objects": (b'{"prompt": "p", "answer": "1"}{"prompt": "q", "answer": "1"}', "is not JSON: Extra data"),
    "not a number": (b'{"prompt": "p", "answer": NaN}', "holds a number that cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_line_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    raw, said = BROKEN[name]
    path = tmp_path / "p.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + raw + b"\n")
    with pytest.raises(RecipeError, match=f"data.path: {path} line [23] {said}") as caught:
        read(path)
    assert len(str(caught.value)) < 700


def test_a_half_pair_with_its_other_half_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b'{"prompt": "\\ud83d\\ude00", "answer": "1"}')
    assert read(tmp_path / "p")[0].question == "\U0001f600"


def test_a_huge_line_is_refused_and_a_long_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LONGEST_LINE", 10_000)
    path = tmp_path / "p"
    for size, is_read in ((9_000, True), (20_000, False)):
        path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"prompt": "x" * size, "answer": "1"}) + "\n")
        if is_read:
            assert len(read(path)[1].question) == size
            continue
        with pytest.raises(RecipeError, match="line 2 has more than 0 MiB"):
            read(path)


def spoil_dataset(directory: Path, name: str) -> None:
    for file in directory.iterdir():
        if file.suffix == ".arrow":
            file.write_bytes(b"x")
    if name == "no state":
        (directory / "state.json").unlink()
    elif name == "splits":
        (directory / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    elif name == "selection":
        (directory / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{"filename": "i"}]}')
    elif name == "state":
        (directory / "state.json").write_text("{}")


@pytest.mark.parametrize(
    ("name", "said"),
    [("arrow", "cannot be read"), ("no state", "is a directory without state.json"), ("state", "cannot be read"),
     ("splits", "holds the splits train, test; name one of them: .*/d/train"), ("selection", "is a selection of rows")],
)  # fmt: skip
def test_a_directory_that_is_no_saved_dataset_is_refused(name: str, said: str, tmp_path: Path) -> None:
    spoil_dataset(save_dataset(tmp_path / "d", ROWS), name)
    with pytest.raises(RecipeError, match=f"data.path: {tmp_path}/d.* {said}"):
        read(tmp_path / "d")


def test_a_broken_parquet_file_and_row_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "p", ROWS, "parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecipeError, match=f"{path} cannot be read"):
        read(path)
    wrong = pyarrow.array([b"fine", b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": wrong, "answer": ["1", "2"]}), path)
    with pytest.raises(RecipeError, match=f"{path} row 2 cannot be read"):
        read(path)
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["prompt", "answer", "prompt"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(RecipeError, match="has the column 'prompt' twice; keep one of them"):
        read(path)
    write(path, [{"prompt": "p", "answer": float("nan")}], "parquet")
    with pytest.raises(RecipeError, match=f"{path} row 1 has `answer`=nan"):
        read(path)


QUESTION = "What is the value of \u00e9 + x?\nAnswer briefly."
SPELLINGS = {
    "trailing blank": QUESTION + "  ",
    "leading line feed": "\n" + QUESTION,
    "line feeds": QUESTION.replace("\n", "\r\n\r\n"),
    "one line": QUESTION.replace("\n", " "),
    "two blanks": QUESTION.replace(" ", "  "),
    "no-break blanks": QUESTION.replace(" ", "\u00a0"),
    "tab": QUESTION.replace(" ", "\t"),
    "decomposed": unicodedata.normalize("NFD", QUESTION),
    "full width": QUESTION.replace("x", "\uff58"),
    "zero width": QUESTION.replace("x", "\u200bx\ufeff"),
    "capitals": QUESTION.upper(),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_held_out_question_in_another_spelling_is_not_trained_on(name: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{i} + 1", "answer": "1"} for i in range(5)]
    apart = write(tmp_path / "held", [{"prompt": QUESTION, "answer": "1"}], "jsonl")
    for prompt in (SPELLINGS[name], [SYSTEM, {"role": "user", "content": SPELLINGS[name]}]):
        path = write(tmp_path / "p", [*rows, {"prompt": prompt, "answer": "1"}], "jsonl")
        source = FileProblems(DataSection(path=path, held_out_path=apart))
        assert source.span == 5 and source.counts["others that ask a held-out question"] == 1
    # Without a file of its own, whichever spelling is held out keeps the other one out.
    both = write(
        tmp_path / "p", [{"prompt": text, "answer": "1"} for text in (QUESTION, SPELLINGS[name])] + rows, "jsonl"
    )
    for held_out in range(1, 6):
        source = FileProblems(DataSection(path=both, held_out=held_out))
        trained = {" ".join(source._training[""][i].question.split()) for i in range(source.span)}
        kept = {" ".join(problem.question.split()) for problem in source.held_out}
        one, other = (" ".join(text.split()) for text in (QUESTION, SPELLINGS[name]))
        assert not ({one, other} & trained and {one, other} & kept)


def test_two_questions_that_share_words_stay_two(tmp_path: Path) -> None:
    rows = [{"prompt": text, "answer": "1"} for text in ("879 + 974", "974 + 879", "8 79 + 974", "879 - 974")]
    apart = write(tmp_path / "held", rows[:1], "jsonl")
    assert FileProblems(DataSection(path=write(tmp_path / "p", rows, "jsonl"), held_out_path=apart)).span == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "system", "assistant", "tool", ""]) | JSON, "content": JSON}
)
LINE = st.fixed_dictionaries(
    {}, optional={"prompt": st.text(max_size=8) | st.lists(MESSAGE, max_size=3) | JSON, "answer": JSON,
                  "messages": st.lists(MESSAGE, max_size=3), "tools": JSON, "source": JSON, "pass_rate": JSON},
)  # fmt: skip
FUZZED = settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_outcome(path: Path) -> None:
    """A file is either read or refused in one sentence with its name; what is read can be used."""
    try:
        found = read(path)
    except RecipeError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
        return
    for problem in found:
        assert problem.question.encode() and problem.answer
        assert pickle.loads(pickle.dumps(problem)) == problem


@FUZZED
@given(
    raw=st.binary(max_size=60) | st.lists(LINE, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
)
def test_lines_of_chance_are_read_or_refused_in_a_sentence(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(raw)
    check_outcome(path)


@FUZZED
@given(
    rows=st.lists(LINE, min_size=1, max_size=3), damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)))
)
def test_damaged_lines_are_read_or_refused_in_a_sentence(
    rows: list[Any], damage: list[tuple[int, int]], tmp_path: Path
) -> None:
    raw = bytearray("\n".join(map(json.dumps, rows)).encode())
    for place, byte in damage:
        raw[place % len(raw)] = byte
    path = tmp_path / "p"
    path.write_bytes(raw)
    check_outcome(path)
