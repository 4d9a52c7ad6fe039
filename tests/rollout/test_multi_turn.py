"""Turns, budgets and halts on a real server: what was sampled has the log-probs of the whole text."""

from __future__ import annotations

from typing import Any

import numpy as np

from gspo_megatron.config.long_responses import EnvironmentSection, RepetitionHalt, ThinkingBudget
from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.environment_pool import EnvironmentPool
from gspo_megatron.controller.multi_turn import Thinking
from gspo_megatron.controller.process_pool import ProcessPool
from gspo_megatron.environments.calculator import calculate
from tests.rollout.environment import SECTION, Characters, make_calculator
from tests.rollout.test_weight_update import update
from tests.rollout.tiny import STOP, make_recipe

CODEC = Characters()
CALLS = tuple(CODEC.encode_text("=ABCDEFGHIJ"))
"""Random weights write one of them in nine tokens."""


def recipe_with(environment: EnvironmentSection | None = None, **rollout: Any) -> Recipe:
    recipe = make_recipe()
    sections = {"rollout": recipe.rollout.model_copy(update=rollout), "environment": environment}
    return recipe.model_copy(update=sections)


def check_logprobs(oracle, store, refs) -> None:
    """Of sampled tokens those of one pass over prompt, answer and all that was put in; 0 where nothing was sampled."""
    for ref in refs:
        token_ids, start, logprobs = store.read(ref)
        wanted = oracle.logprobs(token_ids.tolist())[start - 1 :]
        for span in ref.masked:
            assert not logprobs[span.start : span.end].any()
            wanted[span.start : span.end] = 0
        assert np.abs(wanted - logprobs).max() < 1e-4


def test_the_calculator_answers_between_turns(start_controller, oracles) -> None:
    environment = EnvironmentPool(CALLS, 3, ProcessPool(make_calculator, 1, 60.0, "environment"))
    controller, link = start_controller(recipe=recipe_with(environment=SECTION), environment=environment)
    update(link, 0, oracles[0])
    batch = link.rollout(1)
    refs = batch["samples"]
    check_logprobs(oracles[0], controller.store, refs)
    assert batch["accounting"]["unscored"] == {}
    assert batch["tokens"] == sum(ref.trained_length for ref in refs) == batch["accounting"]["sampled_tokens"]
    replies = 0
    for ref in refs:
        token_ids, start, _ = controller.store.read(ref)
        answer, turn = token_ids[start:].tolist(), 0
        for span in ref.masked:
            assert [token in CALLS for token in answer[turn : span.start]] == [False] * (span.start - turn - 1) + [True]
            call = CODEC.decode(answer[turn : span.start])
            if not ref.sample_index:  # one in four: each is a process
                reply = SECTION.reply.replace("{result}", calculate(call.removesuffix("=")))
                assert CODEC.decode(answer[span.start : span.end]) == reply[: 20 - span.start]
            turn = span.end
        replies += len(ref.masked)
        # What is left is no call, or one that nobody had an answer to: the fourth, or one without room.
        last = [token in CALLS for token in answer[turn:]]
        assert not any(last[:-1]) and len(ref.masked) <= 3
        assert not (last and last[-1]) or (ref.stop_reason == "length" and (len(ref.masked) == 3 or len(answer) == 20))
    assert replies > 20, "hardly a call was made"
    assert batch["measures"]["tool_calls"] == replies / 32


def test_thinking_that_is_closed_goes_on_as_the_policy_would(start_controller, oracles) -> None:
    thinking = Thinking(budget=5, end_id=10, closing=(20, 21, 10))
    settings = recipe_with(thinking=ThinkingBudget(budget=5))
    controller, link = start_controller(recipe=settings, thinking=thinking)
    update(link, 0, oracles[0])
    batch = link.rollout(1)
    check_logprobs(oracles[0], controller.store, batch["samples"])
    closed = 0
    for ref in batch["samples"]:
        token_ids, start, _ = controller.store.read(ref)
        answer = token_ids[start:].tolist()
        # A prompt that holds the end of thinking leaves nothing to close.
        thinks_on = len(answer) >= 5 and 10 not in token_ids[: start + 5] and STOP not in answer[:5]
        assert [(span.start, span.end, span.why) for span in ref.masked] == [(5, 8, "closing")] * thinks_on
        assert not thinks_on or answer[5:8] == [20, 21, 10]
        closed += thinks_on
    assert closed > 20 and batch["measures"]["thinking_closed"] == closed / 32


def test_an_answer_is_halted_where_it_repeats_itself(start_controller, oracles) -> None:
    halt = RepetitionHalt(longest_pattern=1, times=2)
    controller, link = start_controller(recipe=recipe_with(repetition_halt=halt))
    update(link, 0, oracles[0])
    refs = [ref for step in range(3) for ref in link.rollout(step)["samples"]]
    for ref in refs:
        token_ids, start, _ = controller.store.read(ref)
        answer = token_ids[start:].tolist()
        equal = [place for place in range(1, len(answer)) if answer[place] == answer[place - 1]]
        assert equal in ([], [len(answer) - 1])
        # The limit comes before the halt.
        assert (ref.stop_reason == "repetition") == (bool(equal) and len(answer) < 20)
    assert any(ref.stop_reason == "repetition" for ref in refs), "no answer repeated itself"
    check_logprobs(oracles[0], controller.store, refs)
