"""The command `gspo compare`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gspo_megatron.cluster.exit_codes import OK, REFUSED
from gspo_megatron.config.recipe_paths import read_path

PAGE = "comparison.html"
"""Where the page goes, in the directory in which the command is started."""


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `compare` command to the parser."""
    parser = subparsers.add_parser("compare", help="recipes and outcomes of several runs, with intervals over seeds")
    parser.add_argument("run_dirs", type=read_path, nargs="+", metavar="RUN_DIR", help="the first is the one to beat")
    parser.add_argument("--out", type=read_path, default=Path(PAGE), help=f"the page with the curves ({PAGE})")


def run(chosen: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from rich.console import Console

    from gspo_megatron.report.overlay_page import describe_comparison, write_comparison
    from gspo_megatron.report.run_groups import read_runs

    if len({directory.resolve() for directory in chosen.run_dirs}) < max(2, len(chosen.run_dirs)):
        print("gspo compare needs at least two directories, each once", file=sys.stderr)
        return REFUSED
    runs = read_runs(chosen.run_dirs)
    Console(highlight=False).print(describe_comparison(runs))
    try:
        write_comparison(runs, chosen.out)
    except FileExistsError:
        print(f"{chosen.out} exists and is no page of gspo; name another file with --out", file=sys.stderr)
        return REFUSED
    except OSError as error:
        print(f"{chosen.out}: {error.strerror or error}", file=sys.stderr)
        return REFUSED
    print(chosen.out)
    return OK
