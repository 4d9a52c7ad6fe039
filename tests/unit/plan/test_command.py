"""`gspo plan` from the outside: exit codes, output, what it imports and how long it takes."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.config.schema import Recipe
from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.command import add_arguments, run
from gspo_megatron.plan.explain import all_keys, explain
from gspo_megatron.plan.search import search
from tests.chosen_layouts import CHOSEN
from tools.make_schema import TARGET, make_schema

A3B, A22B = "recipes/qwen3_30b_a3b_gspo.yaml", "recipes/qwen3_235b_a22b_gspo_100k.yaml"
SHELL = """
import argparse, sys
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.command import add_arguments, run
parser = argparse.ArgumentParser()
add_arguments(parser.add_subparsers())
code = run(parser.parse_args(sys.argv[1:]))
heavy = {"torch", "megatron", "vllm", "transformers"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""


def plan(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers())
    return run(parser.parse_args(["plan", *arguments]))


def test_the_largest_recipe_takes_less_than_a_second_and_a_half_and_no_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", SHELL, "plan", A22B], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Processor time: the wall clock of a busy test machine says nothing about the planner.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_gpu_hours_are_searched_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("recipes/qwen3_0p6b_gspo.yaml", "--search", "--least", "gpu-hours") == 0
    assert "the fewest GPU-hours for" in capsys.readouterr().out
    assert plan(A3B, "--least", "gpu-hours") == 2
    assert "--least: gpu-hours without --search; add --search" in capsys.readouterr().err


def test_json_has_the_promised_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(A22B, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"findings", "objective", "layout", "batch", "memory", "compute", "rollout"} <= set(found)
    assert found["objective"].startswith("gspo: sequence ratio vs recomputed old policy, clip -3.0e-4/+4.0e-4")
    stages = found["memory"]["stages"]
    assert len(stages) == 8 and all(stage["peak_bytes"] > stage["static_bytes"] > 0 for stage in stages)
    assert sum(found["compute"]["seconds"].values()) == pytest.approx(found["compute"]["seconds_per_step"])
    assert {"code", "severity", "key", "message", "fix"} == set(found["findings"][0])


def test_an_info_about_a_tenth_of_a_step_is_said_in_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    slow = ["placement.gpu=h200", "batch.updates=1", "trainer.expert_parallel=16"]
    assert plan(A3B, *slow, "--json") == 0
    shares = json.loads(capsys.readouterr().out)["shares_of_a_step"]
    assert shares["experts-cross-nodes"] >= 0.1
    assert plan(A3B, *slow) == 0
    verdict = capsys.readouterr().out.splitlines()[-2]
    assert f"experts-cross-nodes is about {shares['experts-cross-nodes']:.0%} of a step" in verdict, verdict


def test_variants_stand_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    lists = "objective.correction=[tis],[]"
    assert plan(A3B, "--compare", "nodes=2,4", lists, "--json", "rollout.max_staleness=0") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["variant"] for row in rows] == [
        f"placement.nodes={nodes} objective.correction={correction}"
        for nodes in (2, 4)
        for correction in ("[tis]", "[]")
    ]
    assert [bool(row["refused"]) for row in rows] == [True, True, False, False]
    assert rows[0]["refused"].endswith("set rollout.servers=8") and rows[0]["seconds_per_step"] is None
    alone = make_plan(load_recipe(Path(A3B), ["placement.nodes=4"])).compute
    assert alone is not None and rows[3]["seconds_per_step"] == alone.seconds_per_step


def test_a_table_says_errors_and_warnings_of_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(A3B, "--compare", "nodes=2,4,8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("placement.nodes=8: warnings ") and "idle-rollout-gpus" in line for line in lines)
    assert not any(line.startswith("placement.nodes=4:") for line in lines)
    assert plan(A3B, "--compare", "nodes=2", "rollout.top_p=0.9,1") == 2
    lines = capsys.readouterr().out.splitlines()
    both = next(line for line in lines if line.startswith("placement.nodes=2 rollout.top_p=0.9: errors "))
    assert "servers-exceed-gpus" in both and "sampler-disagrees" in both
    assert plan(A3B, "--compare", "gpu=h100,v100") == 0
    assert "'a100', 'h20', 'h800', 'h100'" in capsys.readouterr().out


@pytest.mark.parametrize("override", ["rollout.top_p=0.9", "placement.walltime_hours=0.01"])
def test_a_search_says_why_the_recipe_is_refused(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(A3B, "--search", override) == 2
    said = capsys.readouterr().out
    assert "error [" in said and override.partition("=")[0] in said and "as overrides" not in said
    assert plan(A3B, "--search", "--json", override) == 2
    found = json.loads(capsys.readouterr().out)["findings"]
    assert override.partition("=")[0] in {one["key"] for one in found if one["severity"] == "error"}


def test_a_search_that_finds_nothing_prints_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(A22B, "--search", "--nodes", "1") == 2
    said = capsys.readouterr().out
    assert "no layout fits" in said and "fastest first" not in said and "recompute" not in said


def test_recipes_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(A3B, "--compare", A22B, "recipes/none.yaml") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == [Path(A3B).stem, Path(A22B).stem, "none"]
    assert "refused" in lines[3] and lines[4].startswith("fastest: ")
    assert plan(A3B, "--compare", "nodes=" + ",".join(map(str, range(1, 70)))) == 2


def test_rank_coordinates_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(A3B, "trainer.context_parallel=4", "--json", "--ranks") == 0
    ranks = json.loads(capsys.readouterr().out)["layout"]["ranks"]
    assert len(ranks) == 32
    assert ranks[9] == {
        "tensor": 0, "context": 1, "data": 2, "pipeline": 0, "expert_tensor": 0, "expert": 1, "expert_data": 1
    }  # fmt: skip


def test_a_refused_layout_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(A3B, "trainer.tensor_parallel=3", "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] is found["memory"] is found["compute"] is None
    assert found["findings"][0]["severity"] == "error"


def test_nodes_and_gpu_replace_the_placement(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(A3B, "--nodes", "2", "--gpu", "h200") == 2
    shown = capsys.readouterr().out
    assert "16 servers x 2 GPUs = 32, but 2 node(s) have 16; set rollout.servers=8" in shown
    assert plan(A3B, "--nodes", "2", "--gpu", "h200", "rollout.servers=8") == 0


@pytest.mark.parametrize("arguments", [[], ["recipes/none.yaml"], [A3B, "trainer"], [A3B, "no.such=1"]])
def test_what_cannot_be_read_is_refused_with_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_fix_of_a_plan_that_does_not_fit_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(A3B, "trainer.recompute=none", "--json") == 2
    fix = json.loads(capsys.readouterr().out)["findings"][0]["fix"]
    assert fix.startswith("the cheapest change that fits: trainer.recompute=")
    assert plan(A3B, "trainer.recompute=none", fix.split(": ")[1].split()[0]) == 0


def test_every_key_is_explained() -> None:
    recipe = load_recipe(Path(A3B))
    for key in all_keys():
        if key.startswith("cold_start."):
            continue
        shown = explain(key, recipe)
        assert "no description" not in shown, key
        assert len(shown.splitlines()) >= 2, key


def test_every_chosen_default_names_its_source() -> None:
    neutral = {"null", "0", "1", "0.0", "1.0", "false", "none", "off", "run", "[]", "{}"}
    for key in all_keys():
        shown = explain(key)
        lines = dict(line.split(maxsplit=1) for line in shown.splitlines() if line.startswith("  default"))
        default = lines.get("default", "null")
        assert default in neutral or default.startswith("none: it must") or "\n  from" in shown, shown


def test_explain_names_the_nearest_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--explain", "trainer.recompute") == 0
    assert "none | selective | full" in capsys.readouterr().out
    assert plan("--explain", "trainer.recomptue") == 2
    assert "did you mean trainer.recompute?" in capsys.readouterr().err


def test_what_search_proposes_is_planned_without_findings(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(Path(A3B), ["placement.nodes=2", "placement.gpu=h200"])
    changes = search(recipe)[0].change
    overrides = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in changes.items()]
    assert plan(A3B, "--nodes", "2", "--gpu", "h200", *overrides, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [finding for finding in found["findings"] if finding["severity"] != "info"] == []


def test_the_json_schema_is_up_to_date_and_named_by_every_recipe() -> None:
    assert TARGET.read_text() == make_schema(), "run python tools/make_schema.py"
    for path in Path("recipes").glob("qwen3_*.yaml"):
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n"), path


def test_recipes_stay_sparse() -> None:
    for path in Path("recipes").glob("*.yaml"):
        assert len(path.read_text().splitlines()) <= 60, path
    assert set(Recipe.model_fields) >= {"placement", "trainer", "rollout"}


@pytest.mark.parametrize(("name", "overrides"), [one for one in CHOSEN if one[1]])
def test_the_variants_in_the_comments_are_planned_without_findings(name: str, overrides: str) -> None:
    path = Path(f"recipes/{name}.yaml")
    written = " ".join(path.read_text().replace("#", " ").split())
    assert overrides in written
    found = make_plan(load_recipe(path, overrides.split())).findings
    assert [finding for finding in found if finding.severity != "info"] == []
