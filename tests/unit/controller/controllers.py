"""Controllers over fake servers, with scorers that run in a thread."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.controller import Controller
from gspo_megatron.controller.process_pool import Lost, describe_error
from gspo_megatron.controller.servers import ServerSet
from gspo_megatron.controller.teacher_client import Teacher
from gspo_megatron.data.store import SampleStore
from gspo_megatron.models import parse_recipe
from gspo_megatron.rewards import Verdict
from gspo_megatron.rewards.reward_input import RewardInput
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


Score = Callable[[Problem, str, str], float]
"""(problem, text, stop reason) -> score."""


class InThread:
    """Scores without processes, which `test_scoring.py` tests."""

    def __init__(self, score: Score) -> None:
        self.score = score

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def ask(self, problem: Problem, response: RewardInput) -> Future[Verdict | Lost]:
        future: Future[Verdict | Lost] = Future()
        try:
            future.set_result(Verdict(float(self.score(problem, response.text, response.stop_reason))))
        except Exception as error:
            future.set_result(describe_error(error))
        return future


def set_scorer(controller: Controller, score: Score) -> None:
    """Score from now on with this function."""
    pool = controller.scoring.pool
    assert isinstance(pool, InThread)
    pool.score = score


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
    loaded: bool = False,
    teacher: Teacher | None = None,
) -> AsyncIterator[Controller]:
    async with serving(*servers) as clients:
        scoring = InThread(score_first_problem_half)
        store = SampleStore(directory)
        server_set = ServerSet(clients)
        controller = Controller(
            recipe, server_set, Prompts(), Tokenizer(), scoring, store, "127.0.0.1", overlaps, sleeps, loaded=loaded,
            teacher=teacher,
        )  # fmt: skip
        controller.updater.version = version
        yield controller
        await controller.close()
