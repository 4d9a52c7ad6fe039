"""The plot of a run for a README: accuracy, reward and clip fraction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gspo_megatron.metric_rows import read_rows
from gspo_megatron.run_dir import RunDir

CLIP = "clip_fraction_sequences"


def curve(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was recorded; what is no number is left out."""
    values = [(row["step"], row[name]) for row in rows if type(row.get(name)) in (int, float)]
    return [step for step, _ in values], [value for _, value in values]


def describe_evaluations(rows: list[dict[str, Any]]) -> str:
    """How the evaluations of a run sampled, in words; empty where its rows do not say.

    `greedy`, `mean of 4 responses at temperature 0.7`; what changed when the run went on is listed in order.
    """
    found = [(row["eval/temperature"], row["eval/answers"]) for row in rows if "eval/temperature" in row]
    texts = []
    for temperature, answers in dict.fromkeys(found):
        how = "greedy" if temperature == 0 else f"at temperature {temperature:g}"
        texts.append(f"mean of {answers:g} responses {how}" if answers > 1 else how)
    return ", then ".join(texts)


def write_plot(run_dir: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Draw RUN_DIR/accuracy.png from the rows of metrics.jsonl, which are read where they are not at hand."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_rows(run_dir) if rows is None else rows
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7.5, 6.0), sharex=True, height_ratios=(3, 2))
    held_out = ", ".join(filter(None, ("held-out accuracy", describe_evaluations(rows))))
    above.plot(*curve(rows, "eval/accuracy"), "o-", color="#1b6ca8", label=held_out)
    above.plot(*curve(rows, "reward_mean"), "-", color="#e07b39", label="reward of sampled responses")
    rewards = curve(rows, "reward_mean")[1]
    above.set_ylim(min([0.0, *rewards]), max([1.0, *rewards]))
    above.set_ylabel("accuracy, reward")
    above.legend(loc="lower right", frameon=False)
    objective = RunDir(run_dir).objective
    above.set_title(objective.read_text().split(",")[0] if objective.is_file() else "")
    minibatches = sorted({name for row in rows for name in row if name.startswith(f"{CLIP}/minibatch_")})
    for index, name in enumerate(minibatches):
        shade = 0.25 + 0.75 * index / max(1, len(minibatches) - 1)
        below.plot(*curve(rows, name), color="#7a3b8f", alpha=shade, label=f"mini-batch {index}")
    below.set_ylabel("clipped sequences")
    below.set_xlabel("rollout batch")
    below.set_ylim(bottom=0)
    below.legend(loc="upper right", frameon=False, fontsize="small", ncols=2)
    for axis in (above, below):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(RunDir(run_dir).plot, dpi=130)
    pyplot.close(figure)
    return RunDir(run_dir).plot
