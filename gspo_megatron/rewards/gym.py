"""The scorer of a reasoning-gym task."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.types import Problem


def load(data: DataSection) -> None:
    """Import the task before the first response is scored."""
    assert data.task is not None
    _task(data.task, json.dumps(data.options, sort_keys=True))


def score(data: DataSection, problem: Problem, text: str) -> float:
    """Return the task's score. Many tasks give a partial score to a text that contains the answer (0.75 for "9912")."""
    assert data.task is not None
    return _task(data.task, json.dumps(data.options, sort_keys=True)).score_answer(text, problem.line)


@lru_cache(maxsize=4)
def _task(name: str, options: str) -> Any:
    """Return the task's dataset object, which has the scorer. It is made once per process."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, **json.loads(options))
