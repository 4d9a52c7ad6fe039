"""The page of a run: one HTML file that needs no other, and asks no network for anything."""

from __future__ import annotations

import html
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.shared_files import replace_text
from gspo_megatron.report.page_data import read_run
from gspo_megatron.report.panels import Json
from gspo_megatron.run_dir import RunDir

ASSETS = Path(__file__).parent / "assets"
MADE_BY = '<meta name="generator" content="gspo-megatron">'
"""In the first lines of every page of ours."""
SCRIPTS = ("figures.js", "responses.js", "live.js", "page.js")


def write_report(run_dir: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write RUN_DIR/report.html from the files of the run directory, also while the run goes on.

    Args:
        run_dir: its directory.
        rows: of metrics.jsonl in order of step, where they are at hand.
    """
    page = RunDir(run_dir).page
    replace_text(page, make_page(read_run(run_dir, rows=rows), SCRIPTS))
    return page


def make_page(data: Json, scripts: tuple[str, ...]) -> str:
    """The page of some data: styles, Plotly and our scripts within.

    Args:
        data: what the last of the scripts makes the page from; `title` and `objective` are also there without scripts.
        scripts: names in `assets`.
    """
    source = "'self'" if data["live"] else "'none'"
    # Nothing is loaded from elsewhere, whatever a response or a recipe holds.
    policy = (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
        f"connect-src {source}; base-uri 'none'; form-action 'none'"
    )
    title, words = (html.escape(_whole(data[name])) for name in ("title", "objective"))
    code = "".join(f"<script>{_asset(name)}</script>" for name in scripts)
    # A text that no encoding has (half of a surrogate pair) is an escape in JSON.
    held = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'{MADE_BY}<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{title}</title><style>{_asset('page.css')}</style></head>"
        f'<body><div id="root"><h1>{title}</h1><p>{words}</p>'
        "<noscript><p>The figures of this page are drawn by its scripts, which are switched off.</p></noscript></div>"
        f'<script type="application/json" id="run">{held}</script>'
        f"<script>{read_plotly()}</script>{code}</body></html>\n"
    )


def _whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def read_plotly() -> str:
    """Plotly's script, of its Python package, which is not imported.

    Empty where the package is missing: a run must not fail at its end for want of plots. The page then says so, and
    shows the numbers.
    """
    spec = find_spec("plotly")
    if spec is None or spec.origin is None:
        return ""
    return (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
