"""Writes what finished runs of one recipe reached into a small JSON file that the repository keeps.

    .venv/bin/python tools/record_result.py recipes/results/tiny_moe.json RUN_DIR [RUN_DIR ...]

Rows of other seeds stay as they are in the file. `tests/unit/tools/test_results.py` holds the file against the band
that the recipe promises.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gspo_megatron.metric_rows import read_rows
from gspo_megatron.models import load_resolved
from gspo_megatron.run_dir import RunDir


def main() -> int:
    """Read the runs, write the file. Exit 2 with a sentence for a run that is not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON file to write or to add to")
    parser.add_argument("runs", type=Path, nargs="+", help="finished run directories")
    chosen = parser.parse_args()
    known = json.loads(chosen.file.read_text()) if chosen.file.is_file() else {}
    for run in map(RunDir, chosen.runs):
        if not run.done.is_file():
            print(f"{run.path} has no DONE marker: the run is not finished; let it finish first", file=sys.stderr)
            return 2
        result = summarize(run)
        known[f"seed {result['seed']}"] = result
    chosen.file.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    return 0


def summarize(run: RunDir) -> dict[str, Any]:
    """What one run reached, and where."""
    recipe, rows = load_resolved(run.recipe), read_rows(run.path)
    evaluated = [row for row in rows if "eval/accuracy" in row]
    trained = [row for row in rows if "reward_mean" in row]
    return {
        "seed": recipe.run.seed,
        "steps": rows[-1]["step"],
        "held_out_accuracy": [evaluated[0]["eval/accuracy"], evaluated[-1]["eval/accuracy"]],
        "sampled_reward": [trained[0]["reward_mean"], trained[-1]["reward_mean"]],
        "canary_largest": max(row["canary_largest"] for row in trained),
        **({} if recipe.agent is None else summarize_agent(trained)),
        "seconds": round(sum(row.get("seconds/step", 0.0) for row in rows), 1),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "hardware": f"{platform.machine()}, no GPU",
    }


def summarize_agent(trained: list[dict[str, Any]]) -> dict[str, Any]:
    """What the endpoint counted over all steps, and how far trainer and sampler are apart on what it recorded."""
    return {
        "tokens_retokenized": sum(row["tokens_retokenized"] for row in trained),
        "agent_branches": sum(row["agent_branches"] for row in trained),
        "agent_rerendered_turns": sum(row["agent_rerendered_turns"] for row in trained),
        "unscored": sum(row["unscored"] for row in trained),
        "agent_turns": [round(trained[0]["agent_turns"], 3), round(trained[-1]["agent_turns"], 3)],
        "mismatch_abs_max": max(row["mismatch_abs_max"] for row in trained),
    }


if __name__ == "__main__":
    sys.exit(main())
