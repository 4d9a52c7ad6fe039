"""The stages of a step that lengths decide: length rules, length stages, and denominators over trained tokens only."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gspo_megatron.config import RecipeError
from gspo_megatron.models import parse_recipe
from gspo_megatron.objective import BatchTotals, group_advantages
from gspo_megatron.trainer.old_policy import OldScores
from gspo_megatron.trainer.step import Trainer
from gspo_megatron.types import Masked, SampleRef
from tests.unit.controller.group_batches import recipe

LIMIT, BUFFER = 12, 4


def answer(index: int, length: int, reward: float = 1.0, **more: Any) -> SampleRef:
    reason = "length" if length == LIMIT else "stop"
    return SampleRef(f"{index}", 0, index, 3, length, reward, reason, (), **more)


REFS = [answer(0, 4), answer(1, 10), answer(2, 12), answer(3, 5, reward=0.0)]


PLACED = SimpleNamespace(loss_mask=torch.ones(1, dtype=torch.bool))
"""A micro-batch that no model reads."""


class Log:
    """Keeps what a trainer logs."""

    def __init__(self) -> None:
        self.row: dict[str, Any] = {}
        self.add = self.row.update

    def time(self, name: str) -> nullcontext[None]:
        return nullcontext()


def make_trainer(**objective: Any) -> Trainer:
    """A trainer of one rank that has neither a model nor a controller."""
    values = recipe(prompts=1, limit=LIMIT).model_dump(mode="json")
    values["objective"] |= objective
    trainer = Trainer.__new__(Trainer)
    trainer.recipe = parse_recipe(values)
    trainer.spec = trainer.recipe.objective.spec(LIMIT)
    trainer.log = Log()  # type: ignore[assignment]  # in place of a RunLog, which writes into a run directory
    trainer.reference, trainer.version = None, 0
    # Off the last stage: no log-probs, which nothing here depends on.
    trainer.policy = SimpleNamespace(is_last_stage=False)  # type: ignore[assignment]
    trainer.old = SimpleNamespace(score=lambda batches, is_first: OldScores([None], [None], [True]))  # type: ignore[assignment]
    return trainer


def assigned(trainer: Trainer, refs: list[SampleRef] = REFS) -> list[float]:
    """Advantages of the responses that are trained on."""
    trainer.batcher = SimpleNamespace(place_refs=lambda kept: ([list(kept)], [PLACED]))  # type: ignore[assignment]
    [minibatch] = trainer.assign_advantages(refs, trainer.score_old_policy(refs))
    return minibatch.micro_batches[0].advantages.tolist()


def advantages(*rewards: float) -> list[float]:
    trainer = make_trainer()
    values = torch.tensor(rewards, dtype=torch.float64)
    spec = trainer.spec
    found = group_advantages(values, torch.zeros(4), spec.advantage, spec.advantage_ddof, spec.advantage_eps)
    return found.float().tolist()


@pytest.mark.parametrize(
    ("objective", "limit", "rewards"),
    [
        ({}, LIMIT, [1, 1, 1, 0]),
        ({"overlong": "soft", "overlong_buffer": BUFFER}, LIMIT, [1, 0.5, 0, 0]),
        # In a stage of at most 8 tokens the penalty begins at 4; what is longer than its limit has all of it.
        ({"overlong": "soft", "overlong_buffer": BUFFER}, 8, [1, 0, 0, -0.25]),
        ({"overlong": "zero"}, LIMIT, [1, 1, 0, 0]),
    ],
)
def test_the_length_rule_shapes_what_advantages_are_taken_of(
    objective: dict[str, Any], limit: int, rewards: list[float]
) -> None:
    refs = [replace(ref, limit=limit) for ref in REFS]
    assert assigned(make_trainer(**objective), refs) == pytest.approx(advantages(*rewards))


def test_an_answer_that_was_carried_into_a_longer_stage_keeps_its_own_limit() -> None:
    trainer = make_trainer(overlong="soft", overlong_buffer=BUFFER)
    refs = [answer(0, 6, limit=8), answer(1, 6), answer(2, 10), answer(3, 10, limit=LIMIT)]
    assert assigned(trainer, refs) == pytest.approx(advantages(0.5, 1, 0.5, 0.5))


def test_a_filtered_answer_counts_in_its_group_and_is_not_trained_on() -> None:
    trainer = make_trainer(overlong="filter")
    everyone = advantages(1, 1, 1, 0)
    assert assigned(trainer) == pytest.approx([everyone[0], everyone[1], everyone[3]])
    assert trainer.log.row["dropped/filtered"] == 1  # type: ignore[attr-defined]


def test_denominators_count_trained_tokens() -> None:
    trainer = make_trainer()
    packed: list[list[SampleRef]] = []
    trainer.batcher = SimpleNamespace(place_refs=lambda refs: packed.append(list(refs)) or ([list(refs)], [PLACED]))  # type: ignore[assignment]
    talked = answer(4, 11, masked=(Masked(2, 4, "observation"), Masked(5, 8, "closing")))
    mute = answer(5, 3, masked=(Masked(0, 3, "observation"),))
    [minibatch] = trainer.score_old_policy([*REFS, talked, mute])
    assert minibatch.totals == BatchTotals(5, 4 + 10 + 12 + 5 + 6)
    assert packed == [[*REFS, talked]] and trainer.log.row == {"dropped/empty-answer": 1}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("objective", "refs", "key", "said"),
    [
        ({"overlong": "filter"}, [answer(0, LIMIT), answer(1, LIMIT)], "objective.overlong",
         r"filter left out 2 of 2 responses cut at their limit, and 0 of 1 groups are left for .*; raise .*soft"),
        ({}, [answer(0, 3, masked=(Masked(0, 3, "observation"),)), replace(answer(1, 3), stop_reason="abort")],
         "batch.updates", r"1 aborted and 1 empty-answer of 2 responses were left out, and 0 of 1 groups are left"),
        ({"overlong": "filter"}, [answer(0, LIMIT), replace(answer(1, 3), stop_reason="abort")], "objective.overlong",
         "left out 1 of 2 responses cut at their limit, 1 aborted"),
    ],
)  # fmt: skip
def test_too_few_groups_name_the_key_that_left_them_out(
    objective: dict[str, Any], refs: list[SampleRef], key: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=said) as refusal:
        make_trainer(**objective).score_old_policy(refs)
    assert [finding.key for finding in refusal.value.findings] == [key]
