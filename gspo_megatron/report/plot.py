"""The plot of a run: held-out accuracy and sampled reward above, clip fraction by mini-batch below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gspo_megatron.metrics import read_rows

PLOT_FILE = "accuracy.png"
CLIP = "clip_fraction_sequences"


def curve(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was recorded."""
    held = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in held], [value for _, value in held]


def write_plot(run_dir: Path) -> Path:
    """Draw RUN_DIR/accuracy.png from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_rows(run_dir)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7.5, 6.0), sharex=True, height_ratios=(3, 2))
    above.plot(*curve(rows, "eval/accuracy"), "o-", color="#1b6ca8", label="held-out accuracy, greedy")
    above.plot(*curve(rows, "reward_mean"), "-", color="#e07b39", label="reward of sampled answers")
    above.set_ylim(0, 1)
    above.set_ylabel("share correct")
    above.legend(loc="lower right", frameon=False)
    above.set_title(
        (run_dir / "objective.txt").read_text().split(",")[0] if (run_dir / "objective.txt").is_file() else ""
    )
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
    figure.savefig(run_dir / PLOT_FILE, dpi=130)
    pyplot.close(figure)
    return run_dir / PLOT_FILE
