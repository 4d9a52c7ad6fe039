"""The command `gspo report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gspo_megatron.cluster.exit_codes import OK, REFUSED
from gspo_megatron.config.recipe_paths import read_path
from gspo_megatron.metric_rows import read_rows
from gspo_megatron.run_dir import RunDir


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `report` command to the parser."""
    parser = subparsers.add_parser("report", help="write report.html of a run directory, also while it runs")
    parser.add_argument("run_dir", type=read_path)


def run(chosen: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    return report(chosen.run_dir)


def report(run_dir: Path) -> int:
    """Write the plot and the page from what a run recorded so far."""
    metrics = RunDir(run_dir).metrics
    if not metrics.is_file():
        print(f"{run_dir} holds no {metrics.name}; give the directory that `gspo train` printed", file=sys.stderr)
        return REFUSED
    from gspo_megatron.report.page import write_report
    from gspo_megatron.report.plots import write_plot

    try:
        rows = read_rows(run_dir)
        write_plot(run_dir, rows)
        print(write_report(run_dir, rows))
    except OSError as error:  # a mount that may only be read
        print(f"{error.filename or run_dir}: {error.strerror or error}; copy the directory", file=sys.stderr)
        return REFUSED
    return OK
