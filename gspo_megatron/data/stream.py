"""The prompt stream of a run: endless, resumable, never a held-out question."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from typing import Any

from gspo_megatron.config.loading import refuse
from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.problems import open_problems
from gspo_megatron.data.tokenizers import Tokenizer
from gspo_megatron.types import Problem, Prompt

log = logging.getLogger(__name__)

TOO_LONG = "prompt-too-long"
HELD_OUT = "held-out-question"


class PromptStream:
    """Problems of a recipe as prompts. Two streams of one recipe give the same prompts in the same order."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self._source = open_problems(recipe.data)
        self._tokenizer = tokenizer
        self._seed = recipe.run.seed
        self._longest = recipe.rollout.max_prompt_tokens
        content = {"data": recipe.data.model_dump(mode="json"), "seed": self._seed, "longest": self._longest}
        self._fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        self._index = 0
        self._position = 0
        self.skipped: Counter[str] = Counter()
        """Problems passed over so far, by reason."""

    def next(self, count: int) -> list[Prompt]:
        """The next prompts of the training stream; indices go on from the last call's."""
        prompts = []
        for _ in range(count):
            problem, ids, self._position = self._draw("train", self._position, self.skipped)
            prompts.append(Prompt(index=self._index, problem=problem, token_ids=ids))
            self._index += 1
        return prompts

    def held_out(self, count: int) -> list[Prompt]:
        """The first prompts of the held-out set, the same at every call and for every seed.

        Their indices count down from -1, so that their answers cannot be taken for answers to training prompts.
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
            f"{count} problems are wanted; of {len(self._source.held_out)} held-out ones {len(fitting)} fit into "
            f"{self._longest} prompt tokens",
            "set it lower, or hold out more (data.held_out)",
        )

    def training_problems(self, count: int, stage: str) -> list[Problem]:
        """The first problems of another stage's stream, for fine-tuning. Moves nothing; never a held-out question.

        Args:
            count: How many.
            stage: Name of the stream: `cold_start`. Each name has an order of its own.
        """
        if stage == "train":
            raise ValueError("stage 'train' is the reinforcement learning stream; choose another name")
        problems, position, skipped = [], 0, Counter[str]()
        while len(problems) < count:
            problem, _, position = self._draw(stage, position, skipped)
            problems.append(problem)
        return problems

    def state(self) -> dict[str, Any]:
        """Where the stream stands, for a checkpoint; JSON-able."""
        return {
            "index": self._index,
            "position": self._position,
            "skipped": dict(self.skipped),
            "fingerprint": self._fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken. Refuses the state of another data section, seed or prompt limit."""
        if state["fingerprint"] != self._fingerprint:
            raise refuse(
                "resume-other-data",
                "data",
                "the checkpoint's prompts come from another data section, run.seed or rollout.max_prompt_tokens",
                "resume with the run's own recipe.resolved.yaml, or start a new run",
            )
        self._index, self._position = state["index"], state["position"]
        self.skipped = Counter(state["skipped"])

    def _draw(self, stage: str, position: int, skipped: Counter[str]) -> tuple[Problem, tuple[int, ...], int]:
        """The first usable problem at or after a position, its ids, and the position after it."""
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
                    "%s: problem %s is left out, and so is every other above %d tokens",
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
        """Ids of the prompt; None when they are too many."""
        ids = tuple(self._tokenizer.encode_prompt(problem.question))
        return ids if len(ids) <= self._longest else None
