"""What a program of the system prints: SLURM's commands, nvidia-smi, dmesg. Standard library only."""

from __future__ import annotations

import subprocess

TOOL_SECONDS = 60.0
"""How long a tool of the driver is waited for: on a node with a lost GPU, nvidia-smi may never answer."""


def read_command(*words: str, timeout: float | None = None) -> str:
    """Standard output of a program; empty when there is none of that name, it fails or takes more than `timeout` s."""
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
        )
    except OSError:
        return ""
    try:
        text, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # Not waited for: a process that stands in the driver ends when the driver lets it.
        process.kill()
        return ""
    except BaseException:
        process.kill()
        raise
    return text if process.returncode == 0 else ""
