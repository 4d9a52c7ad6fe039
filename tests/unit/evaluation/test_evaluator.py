"""What `gspo eval` prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

from gspo_megatron.evaluation.answers import read_answers
from gspo_megatron.evaluation.estimates import estimate
from gspo_megatron.evaluation.evaluator import describe, table
from gspo_megatron.models import load_recipe
from gspo_megatron.run_dir import RunDir
from tests.places import ROOT


def test_results_are_printed_and_written(tmp_path: Path) -> None:
    run, recipe = RunDir(tmp_path), load_recipe(ROOT / "recipes" / "tiny_moe.yaml", ["evaluation.temperature=0.6"])
    run.weights_source.write_text("/models/m\n")
    lines = [
        {"prompt": -p, "sample": s, "reward": float(s < p), "right": s < p, "tokens": 10 * p,
         "stop_reason": "length" if s else "stop", "unscored": "raised" if (p, s) == (1, 1) else ""}
        for p in (1, 2) for s in (0, 1)
    ]  # fmt: skip
    run.answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = read_answers(run.answers)
    results = estimate(answers.rewards, answers.right)
    assert table(recipe, answers, results) == [
        "2 held-out problems, 2 response(s) each, temperature 0.6; intervals hold the value in 95 %",
        "  avg@2        0.7500  [0.5000, 1.0000]  bootstrap over problems",
        "  pass@1       0.7500  [0.5000, 1.0000]  bootstrap over problems",
        "  pass@2       1.0000  [0.1581, 1.0000]  exact binomial",
        "  mean reward  0.7500  [0.5000, 1.0000]  bootstrap over problems",
        "  15.0 tokens a response; ended by: length 2, stop 2",
        "  responses without a score of their own, counted as wrong: raised 1",
    ]
    written = json.loads(json.dumps(describe(recipe, run, answers, results)))
    assert written["weights"] == "/models/m" and (written["problems"], written["answers"]) == (2, 2)
    assert written["results"][2] == {
        "name": "pass@2", "value": 1.0, "low": results[2].low, "high": 1.0, "method": "exact binomial",
    }  # fmt: skip
