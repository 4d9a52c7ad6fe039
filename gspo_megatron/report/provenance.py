"""With which code and packages a run was started: one line of provenance.jsonl a start."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gspo_megatron import __version__
from gspo_megatron.run_dir import RunDir

PACKAGES = ("torch", "megatron-core", "vllm", "transformers", "transformer-engine", "numpy")
CHECKOUT = Path(__file__).resolve().parents[2]
GIT_SECONDS = 10.0


def record_start(run: RunDir) -> None:
    """Append what this start runs with."""
    with run.provenance.open("a", encoding="ascii") as file:
        file.write(json.dumps(describe_code()) + "\n")


def read_starts(run: RunDir) -> list[dict[str, Any]]:
    """What was recorded, oldest first; a line that was cut off does not count."""
    found = []
    for line in run.provenance.read_text(errors="replace").splitlines() if run.provenance.is_file() else ():
        try:
            start = json.loads(line)
        except ValueError:
            continue
        found += [start] if isinstance(start, dict) else []
    return found


def describe_code() -> dict[str, Any]:
    """Versions of the packages, and the state of the checkout that this code lies in."""
    packages = {name: found for name in PACKAGES if (found := _version(name))}
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "host": platform.node(), "gspo": __version__,
        "python": platform.python_version(), "packages": packages, "git": _git_state(),
    }  # fmt: skip


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _git_state() -> str:
    """`d19a7c31 on main, 2 files changed`; empty where there is no checkout, or no git."""
    commit, branch, changed = (
        _git(*words)
        for words in (("rev-parse", "HEAD"), ("rev-parse", "--abbrev-ref", "HEAD"), ("status", "--porcelain", "-uno"))
    )
    if not commit:
        return ""
    files = len((changed or "").splitlines())
    return f"{commit[:10]} on {branch}, " + {0: "no file", 1: "1 file"}.get(files, f"{files} files") + " changed"


def _git(*words: str) -> str | None:
    if not (CHECKOUT / ".git").exists():  # a package within somebody else's checkout
        return None
    try:
        done = subprocess.run(
            ("git", "-C", str(CHECKOUT), *words), capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
