"""`gspo answers`: every filter, exports, and directories that are being written, cut, or not of ours."""

from __future__ import annotations

import json
import os
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.cli import main
from gspo_megatron.commands.answer_list import read_interval
from gspo_megatron.config import save_resolved
from gspo_megatron.data.sample_index import INDEX
from gspo_megatron.data.store import SampleStore
from gspo_megatron.data.tokenizers import SentencePieceTokenizer
from gspo_megatron.models import load_recipe
from gspo_megatron.report.answer_reader import AnswerFilter, AnswerReader
from gspo_megatron.run_dir import RunDir
from gspo_megatron.types import Problem, Prompt, Response, SampleRef, Segment, StopReason
from tests.places import ROOT

CASES = settings(max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10, deadline=None, print_blob=True)
TOKENIZER = SentencePieceTokenizer(ROOT / "recipes" / "tokenizers" / "arithmetic.model")
REASONS: list[StopReason] = ["stop", "length", "stop", "repetition"]


def asked(prompt: int) -> Prompt:
    return Prompt(prompt, Problem(str(prompt), "", {}), tuple(TOKENIZER.encode_prompt(f"Calculate {prompt} + 1.")))


def write(store: SampleStore, prompt: int, sample: int, reward: float, reason: StopReason) -> SampleRef:
    """A response of `prompt + 1` digits and its end."""
    ids = TOKENIZER.encode_response("1" * (prompt + 1))
    logprobs = np.zeros(len(ids), np.float32)
    response = Response(prompt, sample, np.array(ids, np.int32), logprobs, (Segment(0, 0, len(ids)),), reason)
    return store.write(asked(prompt), response, reward)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Steps 1 to 3 of two prompts with four responses each; the rewards are 0, 0.25, 0.5, 0.75."""
    run = RunDir(tmp_path_factory.mktemp("run"))
    save_resolved(load_recipe(ROOT / "recipes" / "tiny_moe.yaml"), run.recipe)
    store = SampleStore(run.samples)
    for step in (1, 2, 3):
        prompts = (2 * step - 2, 2 * step - 1)
        groups = [(asked(p), [write(store, p, s, s / 4, REASONS[s]) for s in range(4)]) for p in prompts]
        store.finish_step(step, groups, (), None)
    return run


def ask(run: RunDir, tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    file = tmp_path / "export.jsonl"
    file.unlink(missing_ok=True)
    assert main(["answers", str(run.path), *words, "--export", str(file)]) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ([], 24), (["--step", "2"], 8), (["--step", "2:3"], 16), (["--step", ":1"], 8), (["--step", "9"], 0),
        (["--reward", "0.25:0.5"], 12), (["--reward", "0.75"], 6), (["--clipped"], 6),
        (["--stop-reason", "stop"], 12), (["--clipped", "--stop-reason", "stop"], 0),
        (["--contains", "calculate 3 +"], 4), (["--contains", "none"], 0),
        (["--step", "2:", "--reward", "0:0", "--contains", "calculate"], 4),
    ],
)  # fmt: skip
def test_filters(run: RunDir, tmp_path: Path, words: list[str], count: int) -> None:
    assert len(ask(run, tmp_path, *words)) == count


def test_a_line_has_all_there_is(run: RunDir, tmp_path: Path) -> None:
    line = ask(run, tmp_path, "--step", "2")[1]
    expected = {
        "step": 2, "prompt": 2, "sample": 1, "reward": 0.25, "parts": {}, "unscored": "", "stop_reason": "length",
        "tokens": 4, "versions": [0, 0], "response": "111",
    }  # fmt: skip
    assert {name: line[name] for name in expected} == expected
    assert "Calculate 2 + 1." in line["question"] and line.keys() == {*expected, "question"}


def test_the_longest_come_first(run: RunDir, tmp_path: Path) -> None:
    assert [line["tokens"] for line in ask(run, tmp_path, "--longest", "5")] == [7, 7, 7, 7, 6]


def test_the_terminal_shows_some_and_counts_all(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["answers", str(run.path), "--step", "1", "--show", "2"]) == 0
    said = capsys.readouterr()
    assert said.out.count("step 1  prompt 0") == 2 and "reward 0.25  2 tokens  ended by length" in said.out
    assert said.err == "8 responses\n"


def test_an_export_is_a_new_file_or_standard_output(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text("kept")
    assert main(["answers", str(run.path), "--export", str(theirs)]) == 2
    assert "theirs.jsonl exists already; name a new file" in capsys.readouterr().err and theirs.read_text() == "kept"
    assert main(["answers", str(run.path), "--export", "-"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 24
    assert main(["answers", str(run.path), "--export", str(tmp_path / "no" / "x")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def copy_of(run: RunDir, directory: Path) -> RunDir:
    import shutil

    shutil.copytree(run.path, directory)
    return RunDir(directory)


def test_a_run_that_is_being_written_or_was_cut(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a file of tokens that is missing, one that is cut, and an index that is not written yet."""
    other = copy_of(run, tmp_path / "run")
    first, second, _ = sorted(other.samples.glob("written_*"))
    os.truncate(second, second.stat().st_size - 9)
    capsys.readouterr()
    assert len(ask(other, tmp_path)) == 23
    assert capsys.readouterr().err == "23 responses; 1 more are no longer on the disk\n"
    first.unlink()
    assert len(ask(other, tmp_path)) == 15
    for step in (1, 2, 3):
        (other.samples / INDEX.name(step)).rename(other.samples / f".{INDEX.name(step)}.77")
    assert ask(other, tmp_path) == []


def test_a_step_that_was_run_again_counts_once(run: RunDir, tmp_path: Path) -> None:
    other = copy_of(run, tmp_path / "run")
    store = SampleStore(other.samples)
    store.finish_step(3, [(asked(9), [write(store, 9, 0, 1.0, "stop")])], (), None)
    assert [line["prompt"] for line in ask(other, tmp_path, "--step", "3")] == [9]
    assert len(ask(other, tmp_path)) == 17


def test_an_evaluation_is_read_too(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "eval")
    run.path.mkdir()
    save_resolved(load_recipe(ROOT / "recipes" / "tiny_moe.yaml"), run.recipe)
    line = {"prompt": -1, "sample": 0, "question": "Q", "response": "a\nb", "reward": 1.0, "tokens": 3,
            "stop_reason": "stop", "unscored": ""}  # fmt: skip
    lines = [json.dumps(line | {"reward": reward}) + "\n" for reward in (1.0, 0.0)]
    run.answers.write_text("".join(lines) + '{"prompt": -2, "re')
    assert len(ask(run, tmp_path)) == 2 and len(ask(run, tmp_path, "--reward", "1")) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--step", "x"], "'x' is no interval"), (["--step", "5:2"], "give the low end first"),
        (["--longest", "0"], "'0' is no number above 0"), (["--stop-reason", "no"], "invalid choice"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences(
    run: RunDir, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["answers", str(run.path), *words])
    assert sentence in capsys.readouterr().err


def test_other_directories_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["answers", str(tmp_path)]) == 2
    assert "holds no responses; give the directory of a run" in capsys.readouterr().err


@CASES
@given(
    st.tuples(st.integers(-1, 5), st.integers(-1, 5)).map(lambda ends: tuple(map(float, sorted(ends)))),
    st.tuples(st.floats(-1, 2), st.floats(-1, 2)).map(sorted).map(tuple),
    st.sets(st.sampled_from(get_args(StopReason))),
    st.sampled_from(["", "calculate", "Calculate 4", "x"]),
)
def test_filters_are_those_of_a_plain_loop(
    run: RunDir, steps: tuple[float, float], rewards: tuple[float, float], reasons: set[str], contains: str
) -> None:
    wanted = AnswerFilter(steps, rewards, frozenset(reasons), contains)
    everything = list(AnswerReader(run, AnswerFilter()).read())
    expected = [
        line for line in everything
        if steps[0] <= line["step"] <= steps[1] and rewards[0] <= line["reward"] <= rewards[1]
        and line["stop_reason"] in reasons and contains.lower() in line["question"].lower()
    ]  # fmt: skip
    assert list(AnswerReader(run, wanted).read()) == expected


@CASES
@given(st.text("0123456789.:-e ninfa", max_size=8))
def test_any_interval_is_read_or_refused(text: str) -> None:
    try:
        low, high = read_interval(text)
    except ArgumentTypeError as error:
        assert repr(text) in str(error)
    else:
        assert low <= high
