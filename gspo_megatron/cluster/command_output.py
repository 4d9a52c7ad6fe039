"""What a program of the system prints: SLURM's commands, nvidia-smi, dmesg. Standard library only."""

from __future__ import annotations

import subprocess

TOOL_SECONDS = 60.0
"""How long a tool of the driver is waited for: on a node with a lost GPU, nvidia-smi may never answer."""


def read_command(*words: str, timeout: float | None = None, any_code: bool = False) -> str:
    """Standard output of a program; empty when there is none of that name, it fails or takes more than `timeout` s.

    Args:
        words: program and arguments.
        timeout: seconds.
        any_code: whether what it says counts also when it ends with another code than 0. A program that reports
            faults does: nvidia-smi lists every GPU and ends with 14 where one has a damaged infoROM.
    """
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
    return text if process.returncode == 0 or (any_code and process.returncode > 0) else ""
