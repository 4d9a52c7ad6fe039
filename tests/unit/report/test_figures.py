"""Figures, intervals and the browser of responses; a long run; the page in a browser."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.config import save_resolved
from gspo_megatron.data.log_ratios import TrainedResponse, write_log_ratios
from gspo_megatron.data.store import SampleStore
from gspo_megatron.data.tokenizers import SentencePieceTokenizer
from gspo_megatron.models import load_recipe
from gspo_megatron.report.intervals import of_mean, wilson
from gspo_megatron.report.page import write_report
from gspo_megatron.report.page_data import read_run
from gspo_megatron.report.response_pages import Catalogue, Query
from gspo_megatron.report.run_figures import derive, make_figures
from gspo_megatron.report.series import MOST_POINTS, Series, read_series, thin_band
from gspo_megatron.run_dir import RunDir
from gspo_megatron.types import Masked, Problem, Prompt, Response, Segment, StopReason
from tests.places import ROOT

CASES = settings(max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10, deadline=None, print_blob=True)
RECIPE = load_recipe(ROOT / "recipes" / "tiny_moe.yaml")
TOKENIZER = SentencePieceTokenizer(ROOT / "recipes" / "tokenizers" / "arithmetic.model")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def row(step: int, layers: int = 4, minibatches: int = 4) -> dict[str, float]:
    """A row with every name that a figure reads."""
    chance = random.Random(step)
    names = [
        "reward_mean", "reward_group_std", "zero_variance_groups", "solved_groups", "unsolved_groups", "reward/format",
        "answer_length", "truncated", "staleness_mean", "staleness_largest", "dropped_tokens/cut", "grad_norm",
        "learning_rate", "clip_fraction_sequences", "log_s_noise", "mismatch_k3", "mismatch_abs_max", "mismatch_ess",
        "mismatch_correlation", "mismatch_ppl_ratio", "canary_mean", "canary_largest", "token_entropy", "entropy",
        "policy_k3", "reference_kl", "eval/mean_length", "seconds/rollout", "seconds/train", "seconds/sync",
        "teacher_kl", "value_loss", "value_clipped", "value_mean", "return_mean", "explained_variance",
    ]  # fmt: skip
    found = {name: chance.random() for name in names}
    found |= {"step": step, "groups": 64, "rollout_tokens": 1000, "seconds/step": 4.0, "eval/problems": 256}
    found |= {"eval/accuracy": chance.random()}
    for at in range(minibatches):
        for side in ("left", "right"):
            found |= {f"clip_{side}_{unit}/minibatch_{at}": chance.random() for unit in ("sequences", "tokens")}
        found[f"experts/changed/minibatch_{at}"] = chance.random()
    for name in ("load_max_over_mean", "changed", "probe_changed"):
        found |= {f"experts/{name}/layer_{layer}": chance.random() for layer in range(layers)}
    for suffix in ("", "/le_64", "/le_256", "/gt_65536"):
        edges = sorted(chance.gauss(0, 0.01) for _ in range(5))
        found |= dict(zip((f"log_s_{q}{suffix}" for q in ("p01", "p10", "p50", "p90", "p99")), edges, strict=True))
    return found


def write_rows(run: RunDir, rows: list[dict[str, Any]]) -> None:
    save_resolved(RECIPE, run.recipe)
    run.objective.write_text("gspo: sequence ratio, clip\n")
    run.warnings.touch()
    run.metrics.write_text("".join(json.dumps(one) + "\n" for one in rows))


def add_samples(run: RunDir, steps: int = 3, prompts: int = 2, answers: int = 4) -> None:
    """Responses of `prompt + 1` digits; rewards 0, 0.25, ...; the second of each prompt is cut at the limit."""
    store, index = SampleStore(run.samples), 0
    for step in range(1, steps + 1):
        groups = []
        for _ in range(prompts):
            prompt = Prompt(index, Problem(str(index), f"Calculate {index} + 1.\n<b>$x^2$</b>", {}, "7"), (5, 6))
            refs = []
            for sample in range(answers):
                ids = np.array(TOKENIZER.encode_response("1" * (index % 20 + 1)), np.int32)
                logprobs = -np.arange(len(ids), dtype=np.float32) / 2
                reason: StopReason = "length" if sample == 1 else "stop"
                masked = (Masked(0, 1, "closing"),) if sample == 2 else ()
                segments = (Segment(step - 1, 0, len(ids)),)
                response = Response(index, sample, ids, logprobs, segments, reason, masked=masked)
                refs.append(store.write(prompt, response, sample / 4))
            groups.append((prompt, refs))
            index += 1
        store.finish_step(step, groups, (), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("run") / "made")
    run.path.mkdir()
    write_rows(run, [row(step) for step in range(1, 13)])
    add_samples(run)
    return run


@CASES
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(4, 40))
def test_a_thinned_series_keeps_recorded_values_and_every_extreme(values: list[float], most: int) -> None:
    thin = Series(list(range(len(values))), values).thin(most)
    assert len(thin.steps) <= most and thin.steps == sorted(set(thin.steps))
    assert thin.values == [values[step] for step in thin.steps]
    assert (min(thin.values), max(thin.values)) == (min(values), max(values))
    assert thin.steps[0] == 0 and thin.steps[-1] == len(values) - 1


def test_a_thinned_band_holds_all_of_it() -> None:
    steps = list(range(1000))
    low, high = [-math.sin(s) - 1 for s in steps], [math.sin(s) + 1 for s in steps]
    x, (lows, highs) = thin_band(steps, (low, high), 50)
    assert len(x) == 50 and x[-1] == 999
    assert (min(lows), max(highs)) == (min(low), max(high))


def test_intervals_of_known_cases() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)  # Newcombe 1998
    assert wilson(0.0, 10)[0] == 0.0 and wilson(1.0, 10)[1] == pytest.approx(1.0)
    assert of_mean(2.0, 10.0, 100) == pytest.approx((0.04, 3.96), abs=1e-3)


def test_every_figure_is_made_and_described(run: RunDir) -> None:
    figures = {one["id"]: one for one in read_run(run.path)["figures"]}
    wanted = {"reward", "ratio", "clipping", "routers", "gradient", "critic", "mismatch", "policy", "lengths", "time"}
    assert set(figures) == wanted
    for panel in (panel for one in figures.values() for panel in one["panels"]):
        assert (panel["title"] in panel["text"] and "at step" in panel["text"]) or "median" in panel["text"]
    band = figures["ratio"]["panels"][0]["limits"][0]
    assert band["y"] == pytest.approx(math.log1p(-RECIPE.objective.clip_low))
    assert band["to"] == pytest.approx(math.log1p(RECIPE.objective.clip_high))
    lengths = [trace["name"] for trace in figures["ratio"]["panels"][1]["traces"]]
    assert lengths == ["to 64", "to 256", "above 65,536"]
    heat = figures["routers"]["panels"][0]["traces"][0]
    assert heat["y"] == [0, 1, 2, 3] and heat["z"][2][4] == row(5)["experts/load_max_over_mean/layer_2"]
    clipped = figures["clipping"]["panels"]
    assert [len(panel["traces"]) for panel in clipped] == [4] * 4 and "on the left" in clipped[0]["title"]


def test_a_run_without_experts_or_recipe_has_the_other_figures() -> None:
    table = read_series([{"step": 1, "reward_mean": 0.5, "seconds/step": 1.0}])
    derive(table, None)
    assert [one["id"] for one in make_figures(table, None)] == ["reward"]


def test_idle_shares_where_devices_are_shared(run: RunDir) -> None:
    table = read_series(
        [{"step": 1, "rollout_tokens": 100, "seconds/step": 10.0, "seconds/rollout": 6.0, "seconds/sync": 1.0}]
    )
    derive(table, RECIPE)
    assert table["idle/trainers"].values == [0.1] == table["idle/servers"].values
    assert table["tokens_per_second"].values == [10.0]
    own = RECIPE.model_copy(update={"placement": RECIPE.placement.model_copy(update={"rollout_nodes": 1})})
    derive(table, own)
    assert table["idle/trainers"].values == [0.7] and table["idle/servers"].values == [0.4]


def test_long_run_in_five_seconds_and_thirty_megabytes(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    rows = [row(step) for step in range(1, 101)]
    write_rows(run, [{**rows[step % 100], "step": step, "grad_norm": 1.0} for step in range(1, 10_001)])
    with run.metrics.open("a") as file:
        file.write(json.dumps({**rows[0], "step": 10_001, "grad_norm": 77.0}) + "\n")
        file.write(json.dumps({**rows[0], "step": 10_002, "grad_norm": 1.0}) + "\n")
    add_samples(run, steps=30, prompts=8, answers=16)
    began = time.process_time()
    page = write_report(run.path)
    assert time.process_time() - began < 5
    assert page.stat().st_size < 30e6
    found = read_run(run.path)
    assert len(found["series"]["grad_norm"]["x"]) <= MOST_POINTS and 77.0 in found["series"]["grad_norm"]["y"]
    assert any("10,002 steps" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("query", "count"),
    [
        (Query(), 24), (Query(step=(2, 3)), 16), (Query(reward=(0.25, 0.5)), 12), (Query(clipped=True), 6),
        (Query(prompt=3), 4), (Query(contains="calculate 4 +"), 4), (Query(length=(7, math.inf)), 4),
        (Query(step=(9, 9)), 0),
    ],
)  # fmt: skip
def test_queries(run: RunDir, query: Query, count: int) -> None:
    total, items = Catalogue(run).page(query, 0, 1000)
    assert total == count == len(items)


def test_a_page_has_the_stored_logprobs_and_reads_no_other(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue, read = Catalogue(run), []
    monkeypatch.setattr(
        SampleStore, "read", lambda store, ref, old=SampleStore.read: read.append(ref) or old(store, ref)
    )
    total, items = catalogue.page(Query(order="longest"), 1, 2)
    assert total == 24 and len(items) == len(read) == 2 and items[0]["length"] == 7
    assert [logprob for _, logprob in items[0]["tokens"]] == [-at / 2 for at in range(7)]
    assert "".join(text for text, _ in items[0]["tokens"]) == "111111</s>"
    inserted = catalogue.page(Query(prompt=0), 2, 1)[1][0]
    assert inserted["tokens"][0][1] is None and inserted["tokens"][1][1] == -0.5


def test_a_page_has_the_stored_log_ratios_and_finds_what_was_clipped(run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    one, other, third = [each for each in Catalogue(copy).samples() if each.step == 2][:3]
    stored = {}
    for each, left, right in ((one, 1.0, 0.0), (other, 0.0, 0.25), (third, 0.0, 0.0)):
        key = (each.ref.prompt_index, each.ref.sample_index)
        stored[key] = np.linspace(-0.4, 0.3, each.ref.answer_length).astype(np.float16)
        write_log_ratios(copy.samples, 2, each.ref.sample_index, [TrainedResponse(*key, left, right, stored[key])])
    catalogue = Catalogue(copy)
    counts = {side: catalogue.page(Query(lost=side), 0, 100)[0] for side in ("", "left", "right", "either", "up")}
    assert counts == {"": 24, "left": 1, "right": 1, "either": 2, "up": 0}
    for item in catalogue.page(Query(), 0, 100)[1]:
        key = (item["prompt"], item["sample"])
        wanted = stored[key].tolist() if item["step"] == 2 and key in stored else []
        assert item["log_ratios"] == wanted and (item["clipped"] is None) == (not wanted)
    # A mark of another length is of another attempt; one that goes away leaves the page as it was without.
    write_log_ratios(
        copy.samples,
        2,
        9,
        [TrainedResponse(one.ref.prompt_index, one.ref.sample_index, 1.0, 0.0, np.zeros(1, np.float16))],
    )
    assert Catalogue(copy).page(Query(lost="left"), 0, 100)[0] == 0
    shutil.rmtree(copy.samples / "trained_000002")
    assert catalogue.page(Query(lost="either"), 0, 100)[0] == 0


def test_long_responses_are_cut_in_the_middle_and_say_so(run: RunDir) -> None:
    catalogue = Catalogue(run)
    sample = next(one for one in catalogue.samples() if one.ref.answer_length == 7)
    one = catalogue.read(sample, head=3, tail=2)
    assert (len(one["tokens"]), one["left_out"], one["tokens"][-1][0]) == (5, 2, "</s>")


def test_the_drawn_sample_is_as_stated(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    save_resolved(RECIPE, run.recipe)
    add_samples(run, steps=30, prompts=5, answers=8)
    total, items = Catalogue(run).draw()
    steps = sorted({one["step"] for one in items})
    assert (len(steps), steps[0], steps[-1]) == (20, 1, 30) and total == 20 * 40
    assert [sum(one["step"] == step for one in items) for step in steps] == [16] * 20
    assert Catalogue(run).draw() == (total, items)


def test_responses_that_are_gone_leave_their_metadata(run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    for file in copy.samples.glob("written_*"):
        file.unlink()
    total, items = Catalogue(copy).page(Query(), 0, 3)
    assert total == 24 and "no longer" in items[0]["unscored"] and items[0]["tokens"] == []
    shutil.rmtree(copy.samples)
    assert Catalogue(copy).page(Query(), 0, 3) == (0, []) and not copy.samples.exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which draws the page")
def test_without_plotly_the_page_has_words_and_numbers(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CHROMIUM is not None
    monkeypatch.setattr("gspo_megatron.report.page.find_spec", lambda name: None)
    page = write_report(run.path)
    assert page.stat().st_size < 1e6
    words = (CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom")
    done = subprocess.run(
        (*words, "--window-size=1200,9000", page.as_uri()), capture_output=True, text=True, timeout=300
    )
    assert "plotly is not installed" in done.stdout and "mean reward: " in done.stdout
    assert f"<td>{row(12)['grad_norm']:.5g}</td>" in done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which draws the page")
def test_the_page_in_a_browser(run: RunDir) -> None:
    assert CHROMIUM is not None
    page = write_report(run.path)
    words = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--window-size=1200,9000")
    done = subprocess.run(
        (CHROMIUM, *words, "--enable-logging=stderr", "--dump-dom", page.as_uri()),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Uncaught" not in done.stderr and "Refused" not in done.stderr, done.stderr[-2000:]
    for name in (
        "reward",
        "ratio",
        "clipping",
        "routers",
        "gradient",
        "mismatch",
        "policy",
        "lengths",
        "time",
        "responses",
    ):
        assert f'<section id="{name}"' in done.stdout
    assert done.stdout.count('class="main-svg"') >= 40  # Plotly's, at least two of each panel
    assert f"<td>{row(12)['reward_mean']:.5g}</td>" in done.stdout
    assert 'data-logprob="-0.5"' in done.stdout and "rgba(var(--unlikely), 0.075)" in done.stdout
    assert "&lt;b&gt;$x^2$&lt;/b&gt;" in done.stdout
