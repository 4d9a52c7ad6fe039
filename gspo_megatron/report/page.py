"""The page of a run: one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from gspo_megatron.report.plots import write_expert_plot
from gspo_megatron.run_dir import RunDir
from gspo_megatron.run_log import read_rows

COLUMNS = {
    "eval/accuracy": "held-out accuracy",
    "reward_mean": "sampled reward",
    "answer_length": "answer length",
    "clip_fraction_sequences": "clipped sequences",
    "log_s_abs_max/minibatch_0": "max |log s|, mini-batch 0",
    "grad_norm": "gradient norm",
    "canary_mean": "canary mean",
    "canary_largest": "canary largest",
    "seconds/step": "seconds",
}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4 } th { font-weight: 600 }
td.text { text-align: left; font-family: ui-monospace, monospace }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
"""


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html from metrics.jsonl, the plots, examples.json and the resolved recipe."""
    run, rows, experts = RunDir(run_dir), read_rows(run_dir), write_expert_plot(run_dir)
    parts = [
        f"<h1>{html.escape(run_dir.name)}</h1>",
        f"<p>{html.escape(_read(run.objective))}</p>",
        _image(run.plot, "accuracy, reward and clip fraction by step"),
        _image(experts, "changed expert choices and load by layer and step") if experts else "",
        "<h2>Three responses of the last evaluation</h2>",
        _examples(run.examples),
        "<h2>Steps</h2>",
        _table(rows),
        "<h2>Recipe</h2>",
        f"<pre>{html.escape(_read(run.recipe))}</pre>",
    ]
    head = f"<!doctype html><meta charset=utf-8><title>{html.escape(run_dir.name)}</title><style>{STYLE}</style>"
    run.page.write_text(head + "\n".join(parts))
    return run.page


def _image(file: Path, text: str) -> str:
    return f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'


def _read(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""


def _examples(file: Path) -> str:
    examples = json.loads(_read(file) or "[]")
    cells = [
        "".join(
            f'<td class="text">{html.escape(str(example[key]))}</td>' for key in ("question", "answer_text", "reward")
        )
        for example in examples
    ]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _table(rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in ("step", *COLUMNS.values()))
    body = "".join(
        f"<tr><td>{row['step']}</td>" + "".join(f"<td>{_number(row.get(name))}</td>" for name in COLUMNS) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
