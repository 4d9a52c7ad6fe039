"""The page of a run: one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from gspo_megatron.metric_rows import read_rows
from gspo_megatron.report.plots import describe_evaluations, write_expert_plot
from gspo_megatron.run_dir import RunDir

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
:root { color-scheme: light dark; --text: #222; --page: #fff; --panel: #f6f6f6; --line: #e0e0e0 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #161616; --panel: #222; --line: #3a3a3a }
  img { filter: invert(.91) hue-rotate(180deg) }
}
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); background: var(--page); overflow-wrap: break-word }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line) }
th { font-weight: 600; vertical-align: bottom; max-width: 6.5rem }
.scroll { overflow-x: auto }
.scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; background: var(--page) }
pre, .example { background: var(--panel); padding: .8rem 1rem; border-radius: 4px; margin: .8rem 0 }
pre { overflow-x: auto }
.example p { margin: 0 } .example .label { opacity: .7; font-size: .85em }
.example .said { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace;
  margin-bottom: .6rem; max-height: 24rem; overflow-y: auto }
"""


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html from metrics.jsonl, the plots, examples.json and the resolved recipe."""
    run, rows, experts = RunDir(run_dir), read_rows(run_dir), write_expert_plot(run_dir)
    title = html.escape(run_dir.absolute().name)
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{html.escape(_read(run.objective))}</p>",
        _image(run.plot, "accuracy, reward and clip fraction by step"),
        _image(experts, "changed expert choices and load by layer and step") if experts else "",
        _examples(run.examples, rows),
        "<h2>Steps</h2>",
        _table(rows),
        "<h2>Recipe</h2>",
        f"<pre>{html.escape(_read(run.recipe))}</pre>",
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
    )
    page = "\n".join([head, *parts, "</body></html>\n"])
    # A text that no encoding has (half of a surrogate pair) must not cost the page.
    run.page.write_text(page, encoding="utf-8", errors="replace")
    return run.page


def _image(file: Path, text: str) -> str:
    return f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def _examples(file: Path, rows: list[dict[str, Any]]) -> str:
    """Responses of the last evaluation, and how it sampled; nothing where there was none."""
    examples = json.loads(_read(file) or "[]")
    if not examples:
        return ""
    last = next((row for row in reversed(rows) if "eval/accuracy" in row), None)
    facts = [] if last is None else [f"step {last['step']}", describe_evaluations([last])]
    about = html.escape(", ".join(filter(None, facts)))
    heading = "<h2>Responses of the last evaluation" + (f" ({about})" if about else "") + "</h2>"
    return heading + "".join(map(_example, examples))


def _example(example: dict[str, Any]) -> str:
    lines = (
        ("question", "said", example["question"]),
        ("response", "said", example["answer_text"]),
        ("reward", "", f"{example['reward']:g}"),
    )
    body = "".join(
        f'<p class="label">{label}</p><p class="{kind}">{html.escape(text)}</p>' for label, kind, text in lines
    )
    return f'<div class="example">{body}</div>'


def _table(rows: list[dict[str, Any]]) -> str:
    """One row a step; where it is wider than the screen it scrolls on its own, beside the numbers of the steps."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in ("step", *COLUMNS.values()))
    body = "".join(
        f"<tr><td>{row['step']}</td>" + "".join(f"<td>{_number(row.get(name))}</td>" for name in COLUMNS) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
