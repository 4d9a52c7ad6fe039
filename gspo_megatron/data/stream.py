"""The prompt stream of a run: endless, resumable, never a held-out question."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from typing import Any

from gspo_megatron.config.loading import refuse
from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.problems import open_problems, problem_id
from gspo_megatron.data.tokenizers import Tokenizer
from gspo_megatron.types import Problem, Prompt

log = logging.getLogger(__name__)

TOO_LONG = "prompt-too-long"
HELD_OUT = "held-out-question"
BY_CONTENT = "content-"
"""Begins a fingerprint of the problems themselves; earlier versions took the recipe's text."""


class PromptStream:
    """The prompts of a recipe. Two streams of one recipe give the same prompts in the same order."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self._source = open_problems(recipe.data, needs_answer=not recipe.reward.is_own)
        self._held_out_ids = frozenset(problem.id for problem in self._source.held_out)
        self._tokenizer = tokenizer
        self._seed = recipe.run.seed
        self._longest = recipe.rollout.max_prompt_tokens
        content = {
            "problems": self._source.fingerprint,
            "mixture": recipe.data.mixture,
            "seed": self._seed,
            "longest": self._longest,
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self._fingerprint = f"{BY_CONTENT}{digest[:32]}"
        self._index = 0
        self._position = 0
        self.skipped: Counter[str] = Counter()
        """Number of problems skipped so far, by reason."""

    def next(self, count: int) -> list[Prompt]:
        """Return the next prompts of the training stream. Indices continue from the last call."""
        prompts = []
        for _ in range(count):
            problem, ids, self._position = self._draw("train", self._position, self.skipped)
            prompts.append(Prompt(index=self._index, problem=problem, token_ids=ids))
            self._index += 1
        return prompts

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first prompts of the held-out set, the same at every call and for every seed.

        Their indices count down from -1, so that their responses are never mistaken for responses to training prompts.

        Raises:
            RecipeError: fewer held-out prompts fit into the prompt limit.
        """
        fitting = []
        for problem in self._source.held_out:
            ids = self._encode(problem)
            if ids is not None:
                fitting.append(Prompt(index=-1 - len(fitting), problem=problem, token_ids=ids))
            if len(fitting) == count:
                return fitting
        raise refuse(
            "held-out-too-few",
            "evaluation.problems",
            f"{count} problems are set, but of {len(self._source.held_out)} held-out ones {len(fitting)} fit into "
            f"{self._longest} prompt tokens",
            "set it lower, or hold out more (data.held_out)",
        )

    def holds_out(self, question: str) -> bool:
        """Return whether a question is one of the held-out ones."""
        return problem_id(question) in self._held_out_ids

    def training_problems(self, count: int, stage: str) -> list[Problem]:
        """Return the first problems of another stage's stream, for fine-tuning. The stream's position does not change.

        Args:
            count: number of problems.
            stage: name of the stage, e.g. `cold_start`. Each stage has its own order.
        """
        if stage == "train":
            raise ValueError("stage 'train' is the reinforcement learning stream; choose another name")
        problems, position, skipped = [], 0, Counter[str]()
        while len(problems) < count:
            problem, _, position = self._draw(stage, position, skipped)
            problems.append(problem)
        return problems

    def state(self) -> dict[str, Any]:
        """Return the position of the stream for a checkpoint, JSON-serialisable."""
        return {
            "index": self._index,
            "position": self._position,
            "skipped": dict(self.skipped),
            "fingerprint": self._fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises RecipeError for other problems, another seed or prompt limit."""
        found = state["fingerprint"]
        if not found.startswith(BY_CONTENT):
            # The resume rule has compared the recipes; earlier versions kept nothing of the problems themselves.
            log.warning("the checkpoint is of an earlier version: whether its problems are these is not known")
        elif found != self._fingerprint:
            raise refuse(
                "resume-other-data",
                "data",
                "the problems are not those of the checkpoint: a line was added, removed or changed, or data.mixture, "
                "run.seed or rollout.max_prompt_tokens is another",
                "put the files back as they were, or start another run from its weights (model.path)",
            )
        self._index, self._position = state["index"], state["position"]
        self.skipped = Counter(state["skipped"])

    def _draw(self, stage: str, position: int, skipped: Counter[str]) -> tuple[Problem, tuple[int, ...], int]:
        """Return the first usable problem at or after a position, its ids, and the position after it."""
        for refused in range(self._source.span):
            problem = self._source.draw(stage, self._seed, position + refused)
            if problem is None:
                skipped[HELD_OUT] += 1
                continue
            ids = self._encode(problem)
            if ids is not None:
                return problem, ids, position + refused + 1
            skipped[TOO_LONG] += 1
            if skipped[TOO_LONG] == 1:
                log.warning(
                    "%s: problem %s is left out, as is every prompt of more than %d tokens",
                    TOO_LONG,
                    problem.id,
                    self._longest,
                )
        raise refuse(
            "no-usable-prompt",
            "rollout.max_prompt_tokens",
            f"none of {self._source.span} problems in a row is usable (limit {self._longest} tokens): {dict(skipped)}",
            "raise the limit, or hold out fewer questions",
        )

    def _encode(self, problem: Problem) -> tuple[int, ...] | None:
        """Return the ids of the prompt, or None if there are more than the limit."""
        ids = tuple(self._tokenizer.encode_prompt(problem.question))
        return ids if len(ids) <= self._longest else None
