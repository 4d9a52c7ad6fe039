"""Metric sinks: one run over all attempts, no error of theirs ends a run, no key is written anywhere."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron import cli
from gspo_megatron.config import RecipeError
from gspo_megatron.config.secret_text import hide_secrets
from gspo_megatron.models import load_recipe
from gspo_megatron.plan.rules import metric_sinks
from gspo_megatron.plan.run_plan import check
from gspo_megatron.run_log import RunLog, read_rows
from gspo_megatron.sinks.sink_protocol import SinkRun, check_sink, try_sink
from gspo_megatron.sinks.sink_threads import BUILT_IN, Sinks, SinkThread, load_sink, open_sinks
from tests.places import ROOT
from tests.waiting import HANG

TINY = ROOT / "recipes" / "tiny_moe.yaml"
CSV = f"{ROOT}/recipes/sinks/csv_rows.py:CsvRows"
ROW = {"reward_mean": 0.5, "answer_length": 18.25, "clip_fraction_sequences": 0.125, "grad_norm": math.nan}
KEY = "0123456789abcdef0123456789abcdef01234567"


def sink_run(directory: Path) -> SinkRun:
    return SinkRun("0123456789abcdef", "tiny", "gspo", directory, False, {"run": {"name": "tiny"}})


def attempt(run_dir: Path, sinks: Sinks, *steps: int) -> None:
    run_dir.mkdir(exist_ok=True)
    with RunLog(run_dir, owns_terminal=True, sinks=sinks) as log:
        for step in steps:
            with log.step(step):
                log.add(ROW)


def test_a_users_own_sink_gets_every_row_of_every_attempt(tmp_path: Path) -> None:
    recipe = load_recipe(TINY, [f"metrics.sinks={CSV}"])
    for steps in ((1, 2), (2, 3)):
        attempt(tmp_path, open_sinks(recipe, tmp_path, "00ff"), *steps)
    lines = (tmp_path / "sinks" / "CsvRows" / "rows.csv").read_text().splitlines()
    assert [line for line in lines if ",reward_mean," in line] == [f"{step},reward_mean,0.5" for step in (1, 2, 2, 3)]
    assert [row["sink_failures"] for row in read_rows(tmp_path)] == [0, 0, 0]


def test_two_sinks_of_one_name_have_a_directory_each(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text((ROOT / "recipes" / "sinks" / "csv_rows.py").read_text())
    recipe = load_recipe(TINY, [f"metrics.sinks=['{CSV}', '{tmp_path}/other.py:CsvRows']"])
    attempt(tmp_path / "run", open_sinks(recipe, tmp_path / "run", "00ff"), 1)
    assert len(list((tmp_path / "run" / "sinks").glob("*/rows.csv"))) == 2


def test_without_sinks_nothing_is_counted(tmp_path: Path) -> None:
    attempt(tmp_path, open_sinks(load_recipe(TINY), tmp_path, "00ff"), 1)
    assert "sink_failures" not in read_rows(tmp_path)[0] and not (tmp_path / "sinks").exists()


class Broken:
    """Raises where it is asked to."""

    def __init__(self, where: str = "", error: BaseException | None = None) -> None:
        self.where, self.error = where, error
        self.fail("make")

    def fail(self, where: str) -> None:
        if where == self.where and self.error is not None:
            raise self.error

    def write(self, step: int, row: Any) -> None:
        self.fail("write")

    def close(self) -> None:
        self.fail("close")


@pytest.mark.parametrize("error", [RuntimeError("no route"), SystemExit(1), KeyError("run")])
@pytest.mark.parametrize(("where", "lost"), [("make", 3), ("write", 3), ("close", 0)])
def test_a_sink_that_raises_ends_nothing_is_named_once_and_counted(
    where: str, lost: int, error: BaseException, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thread = SinkThread("mine", lambda run: Broken(where, error), sink_run(tmp_path))
    attempt(tmp_path, Sinks([thread]), 1, 2, 3)
    said = [line for line in capsys.readouterr().out.splitlines() if "metric-sink-failed" in line]
    assert len(said) == 1 and f"mine failed: {type(error).__name__}" in said[0]
    assert thread.failures == lost
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]
    assert all(row["sink_failures"] <= lost for row in read_rows(tmp_path))


def test_a_sink_that_hangs_holds_up_nothing(tmp_path: Path) -> None:
    entered, released = threading.Event(), threading.Event()

    class Hanging(Broken):
        def write(self, step: int, row: Any) -> None:
            entered.set()
            released.wait(HANG)

    thread = SinkThread("slow", lambda run: Hanging(), sink_run(tmp_path))
    sinks = Sinks([thread])
    for step in range(3):
        sinks.write(step, ROW)
    assert entered.wait(HANG)
    said = list(sinks.close(seconds=0.01))
    assert [finding.code for finding in said] == ["metric-sink-slow"] and "slow did not finish" in said[0].message
    released.set()
    assert thread.wait(HANG)


def test_what_a_library_says_of_its_key_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open sesame")
    monkeypatch.setenv("SHORT_KEY", "a")
    text = f"401 for {KEY} at https://me:open%20sesame@site/api with open sesame and a"
    assert hide_secrets(text) == "401 for *** at https://***@site/api with *** and a"
    thread = SinkThread("mine", lambda run: Broken("make", ValueError(text)), sink_run(tmp_path))
    (said,) = Sinks([thread]).close()
    assert KEY not in str(said) and "sesame" not in str(said)


METHODS = "    def write(self, step, row): pass\n    def close(self): pass\n"
MADE = "class Sink:\n    def __init__(self, run): pass\n"
WRONG = {
    "Sink = 1\n": "it is a int",
    "Sink = 'text'\n": "it is a str",
    "def Sink(): ...\n": "is called with one SinkRun",
    "def Sink(run, other): ...\n": "is called with one SinkRun",
    "class Sink:\n" + METHODS: "is called with one SinkRun",
    MADE + "    def close(self): pass\n": "has no method write",
    MADE + "    def write(self, step, row): pass\n": "has no method close",
    MADE + "    write = 1\n    def close(self): pass\n": "has no method write",
    MADE + "    def write(self, row): pass\n    def close(self): pass\n": "write takes other arguments",
    MADE + "    def write(self, step, row): pass\n    def close(self, x): pass\n": "close takes other arguments",
    "other = 1\n": "holds no Sink",
    "import absent_package\n": "cannot be imported",
}


@pytest.mark.parametrize("text", WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_an_object_that_is_no_sink_is_refused_with_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    name = f"{tmp_path}/mine.py:Sink"
    with pytest.raises(RecipeError) as refused:
        load_sink(name)
    assert "metrics.sinks: " in str(refused.value) and WRONG[text] in str(refused.value)
    assert "hook" in [finding.code for finding in check(load_recipe(TINY, [f"metrics.sinks={name}"]), 2)]


def test_the_example_and_every_built_in_sink_keep_the_contract() -> None:
    for name in (CSV, *BUILT_IN):
        assert check_sink(load_sink(name)) == ["it is made from one SinkRun", "it has write(step, row) and close()"]
    assert try_sink(load_sink(CSV)) == ["it took two rows, one with nan and inf, and closed"]
    assert check_sink(lambda run: Broken()) == ["it is made from one SinkRun"]


@pytest.mark.parametrize(("where", "doing"), [("make", "making it"), ("write", "write"), ("close", "close")])
def test_a_trial_says_where_an_object_fails(where: str, doing: str) -> None:
    with pytest.raises(ValueError, match=f"{doing}.* raised KeyError"):
        try_sink(lambda run: Broken(where, KeyError("x")))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("wandbb", "did you mean wandb?"), ("tensorboard", "use one of wandb, mlflow, trackio, file.py:NAME"),
     ("[wandb, wandb]", "names one twice")],
)  # fmt: skip
def test_an_unknown_name_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(TINY, [f"metrics.sinks={text}"])
    assert sentence in str(refused.value)


def test_a_missing_library_is_refused_where_it_would_run_and_said_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = importlib.util.find_spec
    absent = ("wandb", "mlflow", "sqlalchemy", "alembic", "trackio")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else here(name))
    recipe = load_recipe(TINY, ["metrics.sinks=[wandb, mlflow, trackio]"])
    found = list(metric_sinks.findings(recipe, runs_here=False))
    assert [finding.severity for finding in found] == ["warning"] * 3
    install = f"uv pip install --python {sys.prefix}/bin/python"
    assert f"{install} wandb" in found[0].fix and f"{install} mlflow-skinny sqlalchemy alembic" in found[1].fix
    assert cli.main(["train", str(TINY), "metrics.sinks=wandb"]) == 2
    assert "error [metric-sink-missing] metrics.sinks: wandb needs wandb, not found here" in capsys.readouterr().err


Reader = Callable[[Path], tuple[int, list[int]]]


def read_mlflow(directory: Path) -> tuple[int, list[int]]:
    """Runs, and the steps of one metric."""
    base = sqlite3.connect(directory / "mlflow.db")
    (runs,) = base.execute("select count(*) from runs").fetchone()
    return runs, [step for (step,) in base.execute("select step from metrics where key = 'reward_mean' order by step")]


def read_wandb(directory: Path) -> tuple[int, list[int]]:
    """The ids in the names of its files, and the steps in them."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    files, steps = sorted((directory / "wandb").glob("offline-run-*/*.wandb")), []
    for file in files:
        for data in records_of(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                steps.append(record.history.step.num)
    return len({file.name for file in files}), steps


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format behind a header of 7 bytes: checksum, length, kind; blocks of 32 KiB."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read_trackio(directory: Path) -> tuple[int, list[int]]:
    """Runs, and the steps of one metric."""
    base = sqlite3.connect(directory / "gspo.db")
    rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    return len({name for name, *_ in rows}), [step for _, step, text in rows if "reward_mean" in json.loads(text)]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keys of a user; what a library adds to the environment is taken away again."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", KEY)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(("name", "read"), [("wandb", read_wandb), ("mlflow", read_mlflow), ("trackio", read_trackio)])
def test_a_library_keeps_one_run_over_two_attempts_offline_and_no_key(name: str, read: Reader, tmp_path: Path) -> None:
    recipe = load_recipe(TINY, [f"metrics.sinks={name}", f"run.directory={tmp_path}"])
    if list(metric_sinks.findings(recipe, runs_here=True)):
        pytest.skip(f"{name} is not in this environment; gspo_megatron/sinks/README.md says how to add it")
    for steps in ((1, 2), (3,)):
        sinks = open_sinks(recipe, tmp_path, "0123456789abcdef")
        attempt(tmp_path, sinks, *steps)
        assert sinks.failures == 0 and list(sinks.warnings()) == []
    assert read(tmp_path / "sinks" / name) == (1, [1, 2, 3])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if KEY.encode() in path.read_bytes()]
