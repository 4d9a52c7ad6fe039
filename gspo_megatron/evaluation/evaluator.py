"""Role entry of the evaluator: has the controller sample and score held-out problems, then prints and writes results.

python -m gspo_megatron.evaluation.evaluator --run-dir DIR --controller URL
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from gspo_megatron.cluster.child_processes import die_with_parent
from gspo_megatron.config.recipe_paths import short_path
from gspo_megatron.config.schema import Recipe
from gspo_megatron.evaluation.answers import Answers, read_answers
from gspo_megatron.evaluation.estimates import Estimate, estimate
from gspo_megatron.models import load_resolved
from gspo_megatron.run_dir import RunDir
from gspo_megatron.run_log import RunLog
from gspo_megatron.transport.auth import read_key
from gspo_megatron.transport.controller_client import ControllerClient, ControllerError
from gspo_megatron.transport.messages import EvaluationRequest


def main() -> None:
    """Evaluate once; exit 1 with one sentence where the controller or its servers fail."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m gspo_megatron.evaluation.evaluator", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="holds the recipe; results go there")
    parser.add_argument("--controller", required=True, help="where the controller listens")
    arguments = parser.parse_args()
    run = RunDir(arguments.run_dir)
    controller = ControllerClient(arguments.controller, read_key())
    try:
        recipe = load_resolved(run.recipe)
        sample(recipe, controller, RunLog(run.path, owns_terminal=True))
        answers = read_answers(run.answers)
        results = estimate(answers.rewards, answers.right)
        run.evaluation.write_text(json.dumps(describe(recipe, run, answers, results), indent=1) + "\n")
        print("\n".join(table(recipe, answers, results)))
        print(f"answers {short_path(run.answers)}, results {short_path(run.evaluation)}", flush=True)
    except (ControllerError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    finally:
        controller.close()


def sample(recipe: Recipe, controller: ControllerClient, log: RunLog) -> None:
    """Have every response sampled, scored and written to `answers.jsonl`. Raises ControllerError."""
    section = recipe.evaluation
    request = EvaluationRequest(
        problems=section.problems, answers=section.answers, temperature=section.temperature, keep=True
    )
    with log.bars if log.live else nullcontext():
        with log.progress("servers", recipe.rollout.servers) as bar:
            controller.wait_ready(recipe.rollout.start_timeout, lambda status: bar.update(status.ready_servers))
        with log.progress("evaluate", recipe.planned_evaluation * section.answers) as bar:
            controller.evaluate(request, on_progress=lambda progress: bar.update(progress.done, progress.total))


def describe(recipe: Recipe, run: RunDir, answers: Answers, results: list[Estimate]) -> dict[str, object]:
    """The content of `evaluation.json`."""
    problems, count = answers.right.shape
    return {
        "weights": run.weights_source.read_text().strip(),
        "problems": problems,
        "answers": count,
        "temperature": recipe.evaluation.temperature,
        "seed": recipe.run.seed,
        "results": [asdict(result) for result in results],
        "mean_tokens": answers.mean_tokens,
        "stop_reasons": answers.stop_reasons,
        "unscored": answers.unscored,
    }


def table(recipe: Recipe, answers: Answers, results: list[Estimate]) -> list[str]:
    """The lines for the terminal."""
    problems, count = answers.right.shape
    how = "greedy" if recipe.evaluation.temperature == 0 else f"temperature {recipe.evaluation.temperature:g}"
    lines = [f"{problems} held-out problems, {count} response(s) each, {how}; intervals hold the value in 95 %"]
    lines += [f"  {one.name:12} {one.value:.4f}  [{one.low:.4f}, {one.high:.4f}]  {one.method}" for one in results]
    reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(answers.stop_reasons.items()))
    lines.append(f"  {answers.mean_tokens:.1f} tokens a response; ended by: {reasons}")
    if answers.unscored:
        kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(answers.unscored.items()))
        lines.append(f"  responses without a score of their own, counted as wrong: {kinds}")
    return lines


if __name__ == "__main__":
    main()
