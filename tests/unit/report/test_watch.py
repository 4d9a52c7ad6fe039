"""`gspo watch`: a directory that is being written, cut or removed; the live page and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gspo_megatron.cli import main
from gspo_megatron.config import save_resolved
from gspo_megatron.data.log_ratios import TrainedResponse, write_log_ratios
from gspo_megatron.data.store import SampleStore
from gspo_megatron.metric_rows import RowReader
from gspo_megatron.models import load_recipe
from gspo_megatron.report.live_page import LiveRun, LiveServer
from gspo_megatron.report.response_pages import Query
from gspo_megatron.report.run_state import read_state
from gspo_megatron.report.terminal_view import Watch, describe_ranks, watch
from gspo_megatron.run_dir import RunDir
from gspo_megatron.types import Problem, Prompt, Response, Segment
from tests.places import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
THROUGHPUT = (
    "(APIServer pid=1) INFO 11-30 15:01:14 [loggers.py:335] Engine 000: Avg prompt throughput: 917.4 tokens/s, "
    "Avg generation throughput: 1126.1 tokens/s, Running: 255 reqs, Waiting: 15 reqs, CPU KV cache usage: 6.2%, "
    "Prefix cache hit rate: 0.0%\n"
)


def append(run: RunDir, step: int, **values: float) -> None:
    row = {
        "step": step,
        "reward_mean": 0.5,
        "rollout_tokens": 100,
        "seconds/step": 10.0,
        "seconds/rollout": 4.0,
        **values,
    }
    with run.metrics.open("a") as file:
        file.write(json.dumps(row) + "\n")


def beat(run: RunDir, rank: int, stage: str, silent: float = 0.0) -> None:
    run.heartbeat.mkdir(exist_ok=True)
    now = time.time() - silent
    content = {"stage": stage, "entered": 3, "at": now - 4, "written": now}
    (run.heartbeat / f"trainer-{rank}.json").write_text(json.dumps(content))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "made")
    run.path.mkdir()
    recipe = load_recipe(ROOT / "recipes" / "tiny_moe.yaml")
    save_resolved(recipe, run.recipe)
    for step in (1, 2):
        append(run, step)
    run.warnings.write_text(
        '{"step": 2, "code": "mostly-clipped", "severity": "warning", "key": "k", "message": "60%", '
        '"fix": "lower it"}\n'
    )
    for rank in (0, 1):
        beat(run, rank, "rollout")
    logs = run.attempt_logs(1)
    logs.path.mkdir(parents=True)
    logs.log("rollout-0").write_text("start\n" + THROUGHPUT.replace("1126.1", "7.0") + THROUGHPUT + "half a li")
    return run


def said(run: RunDir) -> str:
    console = Console(width=120, record=True, file=StringIO())
    console.print(Watch(run.path).look()[1])
    return console.export_text()


def test_the_terminal_says_what_is_waited_for(run: RunDir) -> None:
    text = said(run)
    assert "running, step 2 of 30, 5 min left" in text
    assert "10 s a step, 10 trained tokens a second" in text
    assert "2 trainer ranks: waits for responses; last progress 4 s ago" in text
    assert "rollout-0  1,126     255      15       6.2%" in text
    assert "reward" in text and "warning [mostly-clipped] step 2: 60%; lower it" in text


def test_silent_ranks_are_named_and_a_silent_run_has_stopped(run: RunDir) -> None:
    beat(run, 1, "train", silent=100)
    state = read_state(run, [], 30)
    assert state.kind == "running" and describe_ranks(state.ranks)[-1] == "silent for 100 s and more: trainer-1"
    beat(run, 0, "train", silent=100)
    assert "not running, step 2 of 30" in said(run)
    run.done.touch()
    assert "finished, step 2 of 30" in said(run)


def test_files_that_are_cut_are_passed_over(run: RunDir) -> None:
    (run.heartbeat / "trainer-0.json").write_text('{"stage": "tr')
    (run.heartbeat / "trainer-x.json").write_text("[]")
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "rew')
    assert "trainer-1: waits for responses" in said(run) and "step 2 of 30" in said(run)


def test_a_directory_that_goes_and_comes_back(run: RunDir, tmp_path: Path) -> None:
    view = Watch(run.path)
    assert view.look()[0] is not None
    run.path.rename(tmp_path / "elsewhere")
    assert view.look()[0] is None
    (tmp_path / "elsewhere").rename(run.path)
    state = view.look()[0]
    assert state is not None and state.step == 2
    run.metrics.write_text("no row\n")
    assert view.look()[0] is None


def test_without_a_terminal_it_says_it_once(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run.path)]) == 0
    assert "waits for responses" in capsys.readouterr().out
    assert main(["watch", str(run.path / "none")]) == 2
    assert "no directory" in capsys.readouterr().err


def test_in_a_terminal_it_ends_with_the_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from gspo_megatron.report import terminal_view

    monkeypatch.setattr(terminal_view.time, "sleep", lambda seconds: run.done.touch())
    console = Console(force_terminal=True, width=100, record=True, file=StringIO())
    watch(run.path, console)
    assert "finished" in console.export_text()


def test_a_reader_reads_what_is_new_and_what_was_replaced(run: RunDir) -> None:
    reader = RowReader(run.metrics)
    assert [row["step"] for row in reader.read()] == [1, 2]
    with run.metrics.open("a") as file:
        file.write('{"step": 3,')
        file.flush()
        assert [row["step"] for row in reader.read()] == [1, 2]
        file.write(' "loss": 1}\n')
    assert [row["step"] for row in reader.read()] == [1, 2, 3]
    fresh = run.path / "fresh"
    fresh.write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 6.0}\n{"step": 9, "loss": 7.0, "more": 12345}\n')
    fresh.replace(run.metrics)
    assert [row["step"] for row in reader.read()] == [1, 2, 9]
    run.metrics.write_text('{"step": 4}\n')
    assert [row["step"] for row in reader.read()] == [4]
    run.metrics.unlink()
    assert reader.read() == []


@pytest.fixture
def server(run: RunDir) -> Iterator[LiveServer]:
    with LiveServer(run.path) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: LiveServer, name: str, host: str = "127.0.0.1", word: str | None = None) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    path = f"/{server.word if word is None else word}/{name}"
    connection.request("GET", path, headers={"Host": f"{host}:{server.server_port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def add_responses(run: RunDir, steps: int, prompts: int, answers: int) -> None:
    store, ids = SampleStore(run.samples), np.array([5, 6, 7], np.int32)
    for step in range(1, steps + 1):
        groups = []
        for at in range(prompts):
            prompt = Prompt(step * prompts + at, Problem("p", f"Calculate {at}.", {}), (5,))
            segments = (Segment(0, 0, 3),)
            responses = [
                Response(prompt.index, one, ids, np.full(3, -0.25, np.float32), segments, "stop")
                for one in range(answers)
            ]
            groups.append((prompt, [store.write(prompt, one, one.sample_index / answers) for one in responses]))
        store.finish_step(step, groups, (), None)


def test_the_live_page_has_what_the_files_have(run: RunDir, server: LiveServer) -> None:
    status, page = ask(server, "")
    assert status == 200 and "connect-src 'self'" in page
    first: dict[str, Any] = json.loads(ask(server, "run?mark=")[1])
    assert first["series"]["reward_mean"] == {"x": [1, 2], "y": [0.5, 0.5]} and first["state"]["kind"] == "running"
    assert ask(server, f"run?mark={first['mark']}")[0] == 304
    append(run, 3, reward_mean=0.75)
    second = json.loads(ask(server, f"run?mark={first['mark']}")[1])
    assert second["series"]["reward_mean"]["y"][-1] == 0.75 and second["mark"] != first["mark"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", ""])
def test_only_this_machine_and_only_by_the_address(server: LiveServer, host: str) -> None:
    assert ask(server, "", host=host)[0] == 403
    assert ask(server, "", word="guess")[0] == 403
    assert ask(server, "", host="localhost")[0] == 200
    assert ask(server, "../recipe.resolved.yaml")[0] == 404


def test_bad_questions_are_answered_with_a_sentence(run: RunDir, server: LiveServer) -> None:
    assert json.loads(ask(server, "responses?lost=either")[1])["total"] == 0
    assert ask(server, "responses?reward_low=x")[0] == 400 and ask(server, "responses?step_low=nan")[0] == 400
    run.metrics.write_text("no row\n")
    status, sentence = ask(server, "run?mark=")
    assert status == 503 and "line 1 is no row" in sentence
    shutil.rmtree(run.path)
    status, sentence = ask(server, "run?mark=")
    assert status == 503 and "is not there" in sentence and not run.path.exists()


def test_fifty_thousand_responses_without_reading_them(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    add_responses(run, steps=20, prompts=50, answers=50)
    read: list[str] = []
    monkeypatch.setattr(
        SampleStore, "read", lambda store, ref, old=SampleStore.read: read.append(ref.path) or old(store, ref)
    )

    live = LiveRun(run.path)
    page = live.responses(Query(reward=(0.9, 1.0), order="newest"), 100, 10)
    assert page["total"] == 20 * 50 * 5 and len(page["items"]) == len(read) == 10
    began = time.process_time()
    assert live.responses(Query(contains="Calculate 7."), 0, 10)["total"] == 1000
    assert time.process_time() - began < 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which draws the page")
def test_the_live_page_in_a_browser(run: RunDir, server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What metrics.jsonl gets after the page was opened is on the page; responses are asked for."""
    assert CHROMIUM is not None
    add_responses(run, steps=1, prompts=2, answers=2)
    write_log_ratios(run.samples, 1, 0, [TrainedResponse(2, 1, 0.0, 1.0, np.full(3, 0.125, np.float16))])
    asked = 0

    def data(live: LiveRun, mark: str = "", old: Any = LiveRun.data) -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            append(run, 3, reward_mean=0.87654)
        return old(live, mark)

    monkeypatch.setattr(LiveRun, "data", data)
    words = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=15000", "--window-size=1200,9000")
    done = subprocess.run(
        (CHROMIUM, *words, "--enable-logging=stderr", "--dump-dom", server.address),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "Uncaught" not in done.stderr and "Refused" not in done.stderr, done.stderr[-2000:]
    assert "<td>0.87654</td>" in done.stdout and "running, step 3 of 30" in done.stdout
    assert "1 to 4 of 4" in done.stdout and done.stdout.count('data-logprob="-0.25"') == 12
    assert done.stdout.count('data-logratio="0.125"') == 3 == done.stdout.count("rgba(var(--likelier), 0.375)")
