"""The own scorer of a reasoning-gym task."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.types import Problem


def load(data: DataSection) -> None:
    """Import what `score` needs, so that no answer's time pays for it."""
    assert data.task is not None
    _task(data.task, json.dumps(data.options, sort_keys=True))


def score(data: DataSection, problem: Problem, text: str) -> float:
    """The task's score; many tasks give part marks to a text that contains the answer ("9912" for 912 gets 0.75)."""
    assert data.task is not None
    return _task(data.task, json.dumps(data.options, sort_keys=True)).score_answer(text, problem.reference)


@lru_cache(maxsize=4)
def _task(name: str, options: str) -> Any:
    """The task's dataset object, which holds its scorer; made once a process."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, **json.loads(options))
