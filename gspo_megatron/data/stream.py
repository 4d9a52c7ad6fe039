"""The prompt stream of a run: endless, resumable, never a held-out question."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from gspo_megatron.config.loading import refuse
from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.conversation_lines import question_key
from gspo_megatron.data.own_source import TRAIN
from gspo_megatron.data.problems import open_problems
from gspo_megatron.data.prompt_writer import PromptWriter
from gspo_megatron.data.tokenizers import Tokenizer
from gspo_megatron.types import Problem, Prompt

log = logging.getLogger(__name__)

TOO_LONG = "prompt-too-long"
HELD_OUT = "held-out-question"
BY_CONTENT = "content-"
"""Begins a fingerprint of the problems themselves; earlier versions took the recipe's text."""
UNREADABLE = "prompt-unreadable"
"""The template or the vocabulary refuses it."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a stretch of the training stream is made of."""

    lengths: tuple[int, ...]
    """Tokens of each usable prompt, in the order of the stream."""
    left_out: dict[str, int]
    """Number of problems that are left out, by reason."""
    first: dict[str, str]
    """Reason -> the fault of the first problem that it left out, in words."""
    alike: int
    """Usable prompts with the very tokens of an earlier one of another problem."""


class PromptStream:
    """The prompts of a recipe. Two streams of one recipe give the same prompts in the same order."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self._source = open_problems(recipe.data, needs_answer=not recipe.reward.is_own)
        self._held_out_keys = frozenset(question_key(one.question, one.messages) for one in self._source.held_out)
        self._writer = PromptWriter(recipe.tokenizer, tokenizer)
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
            problem, ids, self._position = self._draw(TRAIN, self._position, self.skipped)
            prompts.append(Prompt(index=self._index, problem=problem, token_ids=ids))
            self._index += 1
        return prompts

    def held_out(self, count: int | None) -> list[Prompt]:
        """Return the first prompts of the held-out set, the same at every call and for every seed.

        Their indices count down from -1, so that their responses are never mistaken for responses to training prompts.

        Args:
            count: number of prompts; None = all that are usable.

        Raises:
            RecipeError: fewer held-out prompts are usable, or none is.
        """
        fitting, left_out = [], Counter[str]()
        for problem in self._source.held_out:
            if len(fitting) == count:
                break
            ids, reason, _ = self.encode(problem)
            left_out[reason] += 1
            if not reason:
                fitting.append(Prompt(index=-1 - len(fitting), problem=problem, token_ids=ids))
        if fitting and len(fitting) >= (count or 0):
            return fitting
        wanted = "all that fit are" if count is None else f"{count} problems are"
        held_out = len(self._source.held_out)
        raise refuse(
            "held-out-too-few",
            "evaluation.problems",
            f"{wanted} set, but of {held_out} held-out ones {len(fitting)} are usable (limit {self._longest} tokens"
            f"{_in_words(left_out)})",
            "set it lower, hold out more (data.held_out), or raise rollout.max_prompt_tokens",
        )

    def holds_out(self, question: str) -> bool:
        """Return whether a question is one of the held-out ones, in whichever spelling."""
        return question_key(question) in self._held_out_keys

    @property
    def counts(self) -> dict[str, int]:
        """Number of problems by what became of them, for people."""
        return self._source.counts

    def survey(self, positions: int | None = None) -> Survey:
        """Look at the first positions of the training stream. The stream's position does not change.

        Args:
            positions: how many; None = one whole pass over a file.
        """
        lengths, left_out, first = [], Counter[str](), dict[str, str]()
        seen, alike = dict[tuple[int, ...], str](), 0
        for position in range(self._source.span if positions is None else min(positions, self._source.span)):
            problem = self._source.draw(TRAIN, self._seed, position)
            ids, reason, sentence = ((), HELD_OUT, "") if problem is None else self.encode(problem)
            if problem is not None and not reason:
                lengths.append(len(ids))
                alike += seen.setdefault(ids, problem.id) != problem.id
                continue
            left_out[reason] += 1
            first.setdefault(reason, sentence)
        return Survey(tuple(lengths), dict(left_out), first, alike)

    def training_problems(self, count: int, stage: str) -> list[Problem]:
        """Return the first problems of another stage's stream, for fine-tuning. The stream's position does not change.

        Args:
            count: number of problems.
            stage: name of the stage, e.g. `cold_start`. Each stage has its own order.
        """
        if stage == TRAIN:
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
        """Continue where `state` was taken. Raises RecipeError as `refuse_other`."""
        self.refuse_other(state["fingerprint"])
        self._index, self._position = state["index"], state["position"]
        self.skipped = Counter(state["skipped"])

    def refuse_other(self, found: str) -> None:
        """Raise RecipeError if a checkpoint's fingerprint is of other problems, another seed or prompt limit."""
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

    def _draw(self, stage: str, position: int, skipped: Counter[str]) -> tuple[Problem, tuple[int, ...], int]:
        """Return the first usable problem at or after a position, its ids, and the position after it."""
        last: dict[str, str] = {}
        for refused in range(self._source.span):
            problem = self._source.draw(stage, self._seed, position + refused)
            if problem is None:
                skipped[HELD_OUT] += 1
                continue
            ids, reason, sentence = self.encode(problem)
            if not reason:
                return problem, ids, position + refused + 1
            skipped[reason] += 1
            if skipped[reason] == 1:
                log.warning("%s: problem %s is left out, as is every such prompt: %s", reason, problem.id, sentence)
            last[reason] = sentence
        # The key is that of the reason which left out the most.
        worst = max((TOO_LONG, UNREADABLE), key=lambda reason: skipped[reason])
        raise refuse(
            "no-usable-prompt",
            "rollout.max_prompt_tokens" if worst == TOO_LONG else "tokenizer.path",
            f"none of {self._source.span} problems in a row is usable (limit {self._longest} tokens"
            f"{_in_words(skipped)}); the last one {last.get(worst, 'is held out')}",
            "raise the limit, or hold out fewer questions" if worst == TOO_LONG else "correct the template or the data",
        )

    def write(self, problem: Problem) -> list[int]:
        """Return the ids of a prompt, whatever its length. Raises ValueError for one that cannot be written."""
        return self._writer.encode(problem)

    def encode(self, problem: Problem) -> tuple[tuple[int, ...], str, str]:
        """Return the ids of a prompt; or why it is left out, by its reason and in words."""
        try:
            ids = tuple(self.write(problem))
        except ValueError as error:
            return (), UNREADABLE, str(error)
        if len(ids) > self._longest:
            return (), TOO_LONG, f"has {len(ids)} tokens"
        return ids, "", ""


def _in_words(reasons: Counter[str]) -> str:
    return "".join(f", {count} {reason}" for reason, count in sorted(reasons.items()) if reason and count)
