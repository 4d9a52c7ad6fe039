"""Reads `answers.jsonl`, which the controller writes (`controller/answers_file.py`)."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class Answers:
    """What the estimates need of all responses."""

    rewards: np.ndarray
    """[problems, answers] float64."""
    right: np.ndarray
    """[problems, answers] bool: the highest score."""
    mean_tokens: float
    """Tokens of a response."""
    stop_reasons: dict[str, int]
    """Responses by why they ended."""
    unscored: dict[str, int]
    """Responses without a score of their own, by the kind of fault."""


def read_answers(file: Path) -> Answers:
    """Read every response of an evaluation. Raises ValueError where a problem has fewer than another."""
    lines = [json.loads(line) for line in file.read_text(encoding="ascii").splitlines()]
    # They were written in the order in which they were scored.
    lines.sort(key=lambda line: (-line["prompt"], line["sample"]))
    counts = Counter(line["prompt"] for line in lines)
    if not lines or len(set(counts.values())) != 1:
        raise ValueError(f"{file} holds {len(lines)} responses to {len(counts)} problems, not as many to each")
    shape = (len(counts), len(lines) // len(counts))
    return Answers(
        np.array([line["reward"] for line in lines], dtype=np.float64).reshape(shape),
        np.array([line["right"] for line in lines]).reshape(shape),
        sum(line["tokens"] for line in lines) / len(lines),
        dict(Counter(line["stop_reason"] for line in lines)),
        dict(Counter(line["unscored"] for line in lines if line["unscored"])),
    )
