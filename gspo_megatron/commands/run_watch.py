"""The command `gspo watch`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gspo_megatron.cluster.exit_codes import OK, REFUSED
from gspo_megatron.config.recipe_paths import read_path


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `watch` command to the parser."""
    parser = subparsers.add_parser("watch", help="show a run while it goes on, in the terminal or a browser")
    parser.add_argument("run_dir", type=read_path, help="on any file system that this machine sees")
    parser.add_argument("--web", action="store_true", help="serve the page of the run and all of its responses")
    parser.add_argument("--port", type=int, default=0, help="of --web, on the loopback interface (a free one)")


def run(chosen: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    if not chosen.run_dir.is_dir():
        print(f"{chosen.run_dir} is no directory; give the directory that `gspo train` printed", file=sys.stderr)
        return REFUSED
    try:
        return _serve(chosen.run_dir, chosen.port) if chosen.web else _show(chosen.run_dir)
    except KeyboardInterrupt:
        return OK


def _show(run_dir: Path) -> int:
    from rich.console import Console

    from gspo_megatron.report.terminal_view import watch

    watch(run_dir, Console(highlight=False))
    return OK


def _serve(run_dir: Path, port: int) -> int:
    from gspo_megatron.report.live_page import LiveServer

    try:
        server = LiveServer(run_dir, port)
    except (OSError, OverflowError) as error:
        print(f"--port {port}: {error}; name another, or none for a free one", file=sys.stderr)
        return REFUSED
    with server:
        print(f"{server.address}  (Ctrl-C ends it)", flush=True)
        print(f"from another machine first: {server.tunnel}", flush=True)
        server.serve_forever()
    return OK
