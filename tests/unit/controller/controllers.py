"""Controllers over fake servers, with scorers that run in a thread."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.controller import Controller
from gspo_megatron.controller.scoring import Scorer, ScoringPool
from gspo_megatron.controller.servers import ServerSet
from gspo_megatron.data.store import SampleStore
from gspo_megatron.models import parse_recipe
from gspo_megatron.types import Problem
from tests.unit.controller.fakes import FakeServer, Prompts, Tokenizer, serving

ARCHITECTURE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
}


RECIPE = parse_recipe(
    {
        "model": {"architecture": ARCHITECTURE},
        "data": {"path": "unused"},
        "batch": {"prompts": 8, "answers": 3},
        "rollout": {"max_prompt_tokens": 20, "max_answer_tokens": 4, "start_timeout": 2},
    }
)


class InThread(ScoringPool):
    """Scores without processes, which `test_scoring.py` tests."""

    def __init__(self, score: Scorer) -> None:
        super().__init__(lambda: score, 1, 1.0)
        self.score = score

    def start(self) -> None:
        pass

    def _run(self, *job: Any) -> float | str:
        return self.score(*job)


def set_scorer(controller: Controller, score: Scorer) -> None:
    """Score from now on with this function."""
    scoring = controller._scoring
    assert isinstance(scoring, InThread)
    scoring.score = score


def score_first_problem_half(problem: Problem, text: str, reason: str) -> float:
    return 0.5 if problem.id == "0" else 1.0


@asynccontextmanager
async def controlling(
    directory: Path,
    *servers: FakeServer,
    version: int | None = 0,
    recipe: Recipe = RECIPE,
    overlaps: bool = False,
    sleeps: bool = False,
) -> AsyncIterator[Controller]:
    async with serving(*servers) as clients:
        scoring = InThread(score_first_problem_half)
        store = SampleStore(directory)
        server_set = ServerSet(clients)
        controller = Controller(
            recipe, server_set, Prompts(), Tokenizer(), scoring, store, "127.0.0.1", overlaps, sleeps
        )
        controller.updater.version = version
        yield controller
        await controller.close()
