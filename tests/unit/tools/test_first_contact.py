"""`make first-contact` without a GPU: what runs, what is listed as not run, and what a second run repeats."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import pytest

from tests.places import ROOT
from tools import first_contact
from tools.first_contact_steps import LIMIT, STEPS

NOT_HERE = ("slice-100k", "sleep-and-reload", "runners", "two-nodes", "kill-9", "real-model")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_contact, "list_gpus", lambda: [])


def test_the_dry_run_is_green_and_lists_what_it_leaves_out(
    tmp_path: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = tmp_path / "found.json", sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    assert first_contact.run_steps(out, None, again=False) == 0
    # Seconds of a processor: on an idle machine it takes no longer.
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before < 90
    found = json.loads(out.read_text())
    assert found["dry"] and found["versions"]["torch"] and found["hardware"]["gpus"] == []
    assert set(found["steps"]) == {step.name for step in STEPS}
    ran = {name for name, step in found["steps"].items() if step["verdict"] == "passed"}
    assert ran == {step.name for step in STEPS if step.dry is not None}
    for step in found["steps"].values():
        assert step["verdict"] == "passed" or (step["reason"] and step["what_to_do"])
    assert set(NOT_HERE).isdisjoint(ran)
    assert found["steps"]["slice-32k"]["figures"]["taken"] is True
    monkeypatch.setattr(first_contact, "run_command", lambda *_: pytest.fail("a step that passed is not repeated"))
    assert first_contact.run_steps(out, None, again=False) == 0


def test_a_failed_step_says_what_to_do(tmp_path: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = (sys.executable, "-c", "print('seen'); raise SystemExit(3)")
    monkeypatch.setattr("tools.first_contact_steps.STEPS", [STEPS[0].__class__("x", "y", fails, "do this", dry=fails)])
    out = tmp_path / "found.json"
    assert first_contact.run_steps(out, None, again=False) == 1
    step = json.loads(out.read_text())["steps"]["x"]
    assert (step["verdict"], step["what_to_do"], step["said"]) == ("failed", "do this", ["seen"])


def test_a_step_is_ended_at_its_limit() -> None:
    found = first_contact.run_command((sys.executable, "-c", "import time; time.sleep(600)"), limit=0.5)
    assert found["verdict"] == "failed" and "ended after 0.5 s" in found["said"][-1]
    assert LIMIT <= 480


def test_results_of_other_hardware_are_kept(tmp_path: Path, no_gpu: None) -> None:
    out = tmp_path / "found.json"
    other = {"hardware": {"gpus": ["NVIDIA H100"]}, "versions": {}, "steps": {"x": {"verdict": "passed"}}}
    out.write_text(json.dumps(other))
    now = first_contact.begin(out)
    assert now["steps"] == {} and now["earlier"] == [other]


def test_what_is_missing_is_a_reason() -> None:
    by_name = {step.name: step for step in STEPS}
    one = {"gpus": ["NVIDIA H100"], "nodes": 1}
    assert first_contact.obstacle(by_name["slice-100k"], one) == ""
    assert "2 GPUs are needed" in first_contact.obstacle(by_name["one-node"], one)
    assert "salloc" in first_contact.obstacle(by_name["two-nodes"], {"gpus": ["NVIDIA H100"] * 8, "nodes": 1})
    assert "is not there" in first_contact.obstacle(by_name["real-model"], one)


def test_commands_name_files_that_exist() -> None:
    words = [word for step in STEPS for command in (step.command, step.dry) for word in command or ()]
    named = [word for word in words if word.startswith(("tests/", "tools/", "recipes/", "launch/"))]
    assert named and all((ROOT / word).is_file() for word in named)
