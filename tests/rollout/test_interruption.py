"""Answers that are interrupted or outlive an update, on a real server: every log-prob is what it claims to be."""

from __future__ import annotations

import numpy as np
import pytest

from gspo_megatron.config.schema import Recipe
from gspo_megatron.transport.messages import RolloutBatch, RolloutRequest
from tests.rollout.tiny import make_recipe
from tests.rollout.updates import TRAINER, update
from tests.shards import TrainerRanks

SLOTS = 12
"""Answers at a time, of 64 under way: a batch of 32 ends in the middle of others."""


def stale_recipe() -> Recipe:
    recipe = make_recipe()
    return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"max_staleness": 1})})


def check_segments(controller, refs, oracles) -> int:
    """Each segment has the log-probs of its version over the whole text so far; how many segments continue another."""
    later = 0
    for ref in refs:
        token_ids, start, logprobs = controller.store.read(ref)
        assert [span.start for span in ref.segments] == [0, *(span.end for span in ref.segments[:-1])]
        assert ref.segments[-1].end == ref.answer_length
        for span in ref.segments:
            wanted = oracles[span.version].logprobs(token_ids.tolist())[start - 1 :]
            assert np.abs(wanted - logprobs)[span.start : span.end].max() < 1e-4
            later += span.start > 0
    return later


def roll_until_one_is_cut(controller, link) -> RolloutBatch:
    """Batches until the end of one cuts a response half-way, however slow the engine is; the last batch."""
    batch = link.rollout(RolloutRequest(step=0))
    while not cut_half_way(controller):
        batch = link.rollout(RolloutRequest(step=0))
    return batch


def cut_half_way(controller) -> set[tuple[int, int]]:
    """(prompt, sample) of each response that was interrupted in its first request."""
    return {
        (generation.prompt.index, generation.sample_index)
        for group in controller.controller.buffer.groups
        for generation in group.generations
        if generation.sample_index not in group.finished and generation.parts == 1 and 0 < len(generation) < 20
    }


@pytest.mark.parametrize("overlaps", [True, False], ids=["in-flight", "interrupted"])
def test_answers_go_on_under_new_weights(start_controller, oracles, overlaps: bool) -> None:
    # Fewer at a time where the servers go on while the weights come: they must not be done before.
    controller, link = start_controller(recipe=stale_recipe(), overlaps=overlaps, slots=4 if overlaps else SLOTS)
    ranks = TrainerRanks(TRAINER.world)
    update(link, 0, oracles[0], ranks)
    first = link.rollout(RolloutRequest(step=0)) if overlaps else roll_until_one_is_cut(controller, link)
    assert first.accounting.in_flight.tokens > 0, "nothing was under way"
    update(link, 1, oracles[1], ranks)
    second = link.rollout(RolloutRequest(step=1))
    assert check_segments(controller, first.samples, oracles) == 0
    assert check_segments(controller, second.samples, oracles) > 0, "no answer outlived the update"
    assert second.staleness.largest == 1 and 0 < second.staleness.mean < 1


def test_an_interrupted_answer_is_what_it_would_have_been(start_controller, oracles) -> None:
    """Continued under equal weights, all its log-probs are those of one forward pass over the whole text."""
    controller, link = start_controller(recipe=stale_recipe(), overlaps=False, slots=SLOTS)
    update(link, 0, oracles[0])
    roll_until_one_is_cut(controller, link)
    generations = [generation for group in controller.controller.buffer.groups for generation in group.generations]
    cut = cut_half_way(controller)
    refs = [ref for ref in link.rollout(RolloutRequest(step=1)).samples if (ref.prompt_index, ref.sample_index) in cut]
    continued = [ref for ref in refs if generations_of(generations, ref).parts == 2]
    assert continued, "no answer was interrupted half-way"
    check_segments(controller, continued, oracles)


def generations_of(generations, ref):
    return next(d for d in generations if (d.prompt.index, d.sample_index) == (ref.prompt_index, ref.sample_index))
