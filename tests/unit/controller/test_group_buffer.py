"""Every long-tail policy over fake servers: bounds on staleness, exact accounting, nothing lost and nothing doubled."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.controller.controller import Controller
from gspo_megatron.controller.generation import Generation, response_seed
from gspo_megatron.controller.servers import Refused
from gspo_megatron.data.sample_index import read_samples
from gspo_megatron.transport.messages import ControllerState, Empty, RolloutBatch, RolloutRequest, Staleness, TokenCount
from gspo_megatron.types import SampleRef, Segment
from tests.unit.controller.controllers import controlling, set_scorer
from tests.unit.controller.fakes import FakeServer, make_prompt
from tests.unit.controller.group_batches import ANSWERS, check_accounting, recipe, set_version


def prompt_of(body: dict[str, Any]) -> int:
    return int(body["request_id"].split("-")[0])


async def test_what_is_started_beyond_a_synchronous_batch_is_cut(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.length = lambda body: 12 if prompt_of(body) == 1 else 3
    fake.gate = 5  # only short answers end
    async with controlling(tmp_path, fake, recipe=recipe(over_provision=0.25)) as controller:
        batch = await controller.rollout(RolloutRequest(step=1))
        assert sorted({row.prompt_index for row in batch.samples}) == [0, 2, 3, 4]
        assert batch.staleness == Staleness(mean=0.0, largest=0)
        assert batch.accounting.dropped["cut"].prompts == 1
        assert batch.accounting.in_flight == TokenCount()
        check_accounting(batch, controller, fake)
        assert [sample.ref for sample in read_samples(tmp_path)] == list(batch.samples)
        assert len(batch.samples) == 4 * ANSWERS, "answers that were cut are in no index"
        assert not fake.paused
        fake.gate = 99
        again = await controller.rollout(RolloutRequest(step=2))
        assert min(row.prompt_index for row in again.samples) >= 5, "a prompt is never given twice"


async def test_partial_rollout_continues_answers_under_new_weights(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.length = lambda body: 9 if prompt_of(body) == 1 and "-0-" in body["request_id"] else 3
    fake.gate = 5
    async with controlling(tmp_path, fake, recipe=recipe(max_staleness=1, over_provision=0.25)) as controller:
        first = await controller.rollout(RolloutRequest(step=1))
        assert sorted({row.prompt_index for row in first.samples}) == [0, 2, 3, 4]
        [group] = controller.buffer.groups
        assert [len(generation) for generation in group.generations] == [5, 5, 5] and not controller.buffer._running
        set_version(controller, 1, fake)
        fake.gate, fake.length = 99, lambda body: 4
        sent = len(fake.bodies)
        second = await controller.rollout(RolloutRequest(step=2))
        continued = [body for body in fake.bodies[sent:] if prompt_of(body) == 1]
        assert [body["token_ids"] for body in continued] == [[1, 1] + [2] * 5] * ANSWERS
        seeds = [body["sampling_params"]["seed"] for body in continued]
        assert seeds == [response_seed(0, 1, sample, 1) for sample in range(ANSWERS)], "one seed a part"
        assert {body["sampling_params"]["max_tokens"] for body in continued} == {7}
        rows = [row for row in second.samples if row.prompt_index == 1]
        assert [row.segments for row in rows] == [(Segment(0, 0, 5), Segment(1, 5, 9))] * ANSWERS
        assert second.staleness.largest == 1 and 0 < second.staleness.mean < 0.5
        check_accounting(second, controller, fake)


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize(("staleness", "share"), [(1, None), (1, 0.5), (2, None), (3, 1.3)])
async def test_no_token_is_older_than_the_bound(
    tmp_path: Path, overlaps: bool, staleness: int, share: float | None
) -> None:
    random.seed(staleness)
    chosen = recipe(max_staleness=staleness, over_provision=share)

    servers = [FakeServer(), FakeServer()]
    trained: list[int] = []
    for server in servers:
        # A few answers take as long as several batches.
        server.length = lambda body: 12 if random.random() < 0.15 else random.randint(1, 3)
        server.delay = 0.004
    async with controlling(tmp_path, *servers, recipe=chosen, overlaps=overlaps) as controller:
        worst = 0
        for step in range(12):
            batch = await controller.rollout(RolloutRequest(step=step))
            assert len(batch.samples) == 4 * ANSWERS
            groups = {row.prompt_index for row in batch.samples}
            members = [(row.prompt_index, row.sample_index) for row in batch.samples]
            assert members == [(index, sample) for index in sorted(groups) for sample in range(ANSWERS)]
            trained += sorted(groups)
            worst = max(worst, batch.staleness.largest)
            for row in batch.samples:
                assert all(0 <= step - span.version <= staleness for span in row.segments)
            check_accounting(batch, controller, *servers)
            await asyncio.sleep(0.01)
            await pause(controller, *servers)
            set_version(controller, step + 1, *servers)
            for server in servers:
                server.paused = False
        assert len(trained) == len(set(trained)) == 48, "no prompt twice"
        assert worst > 0, "nothing was carried: the test shows nothing"


async def pause(controller: Controller, *servers: FakeServer) -> None:
    controller.updater.version = None
    for server in servers:
        server.paused = True
    await asyncio.sleep(0.01)


async def test_a_lost_server_costs_its_answers_only_what_was_not_sent(tmp_path: Path) -> None:
    good, bad = FakeServer(), FakeServer()
    good.length = bad.length = lambda body: 8
    bad.break_off_at = 6
    async with controlling(tmp_path, good, bad, recipe=recipe()) as controller:
        batch = await controller.rollout(RolloutRequest(step=1))
        lost = {body["request_id"].rsplit("-", 2)[0] for body in bad.bodies}
        assert lost
        moved = [body for body in good.bodies if body["request_id"].split("-")[2] == "1"]
        assert {body["request_id"].rsplit("-", 2)[0] for body in moved} == lost
        assert all(body["sampling_params"]["max_tokens"] == 6 for body in moved), "six tokens were kept"
        assert len(batch.samples) == 4 * ANSWERS
        check_accounting(batch, controller, good, bad)


async def test_tokens_of_an_unfinished_update_are_not_kept(tmp_path: Path) -> None:
    """A server that dies in the canary has sampled under weights that nobody confirmed."""

    good, bad = FakeServer(), FakeServer()
    good.length = bad.length = lambda body: 3 if prompt_of(body) < 4 else 8
    good.gate = bad.gate = 4
    bad.break_off_at = 6
    async with controlling(tmp_path, good, bad, recipe=recipe(max_staleness=1), overlaps=True) as controller:
        await controller.rollout(RolloutRequest(step=1))
        while any(len(generation) < 4 for group in controller.buffer.groups for generation in group.generations):
            await asyncio.sleep(0.01)
        controller.updater.version = None
        lost_generations = len(controller.servers.all[1].generations)
        bad.version, bad.gate = "1", 99
        while not controller.servers.faults()[bad.url]:
            await asyncio.sleep(0.01)
        good.gate = 99
        set_version(controller, 1, good)
        batch = await controller.rollout(RolloutRequest(step=2))
        check_accounting(batch, controller, good, bad)
        moved = [body for body in good.bodies if body["request_id"].split("-")[2] == "1"]
        assert moved and all(body["sampling_params"]["max_tokens"] == 8 for body in moved), "four tokens were kept"
        # The first one that breaks off takes its server out, so others may not have received theirs.
        dropped = batch.accounting.dropped["server-lost"]
        assert dropped.prompts == 0 and 2 <= dropped.tokens <= 2 * lost_generations


async def test_a_version_that_is_left_out_drops_what_became_too_old(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.length = lambda body: 3 if prompt_of(body) < 4 else 8
    fake.gate = 4
    async with controlling(tmp_path, fake, recipe=recipe(max_staleness=1), overlaps=True) as controller:
        await controller.rollout(RolloutRequest(step=1))
        while any(len(generation) < 4 for generation in controller.servers.all[0].generations):
            await asyncio.sleep(0.01)
        fake.gate = 99
        set_version(controller, 2, fake)  # an update to version 1 had failed
        batch = await controller.rollout(RolloutRequest(step=2))
        assert batch.accounting.dropped["too-stale"].prompts >= 1
        assert batch.staleness.largest == 0


async def test_dynamic_sampling_replaces_groups_of_equal_rewards(tmp_path: Path) -> None:
    fake = FakeServer()
    async with controlling(tmp_path, fake, recipe=recipe(filters="dynamic_sampling")) as controller:
        # Members of every second prompt get different rewards.
        set_scorer(controller, lambda problem, text, reason: next(values) if int(problem.id) % 2 else 1.0)
        values = iter(range(10_000))
        batch = await controller.rollout(RolloutRequest(step=1))
        assert all(row.prompt_index % 2 for row in batch.samples)
        assert batch.accounting.dropped["equal-rewards"].prompts >= 3
        check_accounting(batch, controller, fake)
        set_scorer(controller, lambda problem, text, reason: 0.0)
        with pytest.raises(Refused, match=r"81 groups in a row have equal rewards \(the last 0\)"):
            await controller.rollout(RolloutRequest(step=2))


async def test_a_controller_goes_on_from_its_state(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.length = lambda body: 9 if prompt_of(body) == 1 and "-0-sampled" in body["request_id"] else 3
    fake.gate = 5
    settings = recipe(max_staleness=1, over_provision=0.5)
    store = tmp_path / "samples"
    async with controlling(store, fake, recipe=settings) as controller:
        first = await controller.rollout(RolloutRequest(step=1))
        state = ControllerState.from_json((await controller.state(Empty())).to_json())
        set_version(controller, 1, fake)
        fake.gate = 99
        wanted = await controller.rollout(RolloutRequest(step=2))
    async with controlling(store, fake, recipe=settings) as restored:
        await restored.restore(state)
        set_version(restored, 1, fake)
        found = await restored.rollout(RolloutRequest(step=2))
    carried = {row.prompt.index for row in state.groups}
    assert 1 in carried and first.accounting.in_flight.tokens > 0

    def of_carried(batch: RolloutBatch) -> list[SampleRef]:
        return [replace(row, path="") for row in batch.samples if row.prompt_index in carried]

    assert of_carried(found) == of_carried(wanted) != []
    assert found.accounting.taken == wanted.accounting.taken
    started = {body["request_id"].split("-")[0] for body in fake.bodies}
    assert started == {str(index) for index in range(10)}, "the stream goes on where the groups end"


async def test_what_an_attempt_takes_with_it_is_counted_and_made_again(tmp_path: Path) -> None:
    """Killed after its state was taken: tokens of both attempts are accounted for, every answer is there once."""

    fake = FakeServer()
    settings = recipe(max_staleness=1, over_provision=0.5)
    store = tmp_path / "samples"
    async with controlling(store, fake, recipe=settings) as controller:
        await controller.rollout(RolloutRequest(step=1))
        state = ControllerState.from_json((await controller.state(Empty())).to_json())
        finished = [ref for row in state.groups for ref in row.finished]
        set_version(controller, 1, fake)
        await controller.rollout(RolloutRequest(step=2))
        before = fake.tokens
    assert finished and len({row.prompt.index for row in state.groups}) == 2
    # What a group that is dropped after the checkpoint leaves behind; and the index of a step that is done again.
    file, offset = finished[0].path.split("@")
    with (store / file).open("r+b") as opened:
        opened.seek(int(offset))
        opened.write(bytes(4))
    assert {sample.step for sample in read_samples(store)} == {1, 2}
    async with controlling(store, fake, recipe=settings) as restored:
        await restored.restore(state)
        set_version(restored, 1, fake)
        found = await restored.rollout(RolloutRequest(step=2))
        check_accounting(found, restored, fake)
        lost = found.accounting.dropped["attempt-lost"].tokens
        assert lost == before - state.accounting.sampled_tokens + finished[0].answer_length
        carried = {row.prompt.index for row in state.groups}
        assert {row.prompt_index for row in found.samples} >= carried
        for row in found.samples:
            assert restored._store.holds(row)
        assert [sample.ref for sample in read_samples(store, {2}.__contains__)] == list(found.samples)
        again = ControllerState.from_json((await restored.state(Empty())).to_json())
    places = [(sample.ref.prompt_index, sample.ref.sample_index) for sample in read_samples(store)]
    assert len(places) == len(set(places)), "every answer is there once"
    async with controlling(store, fake, recipe=settings) as third:
        await third.restore(again)
        reported = third.buffer.ledger.report(third.buffer.groups)
        assert reported.sampled_tokens == fake.tokens, "a second restart counts nothing twice"


def test_a_generation_keeps_its_versions_in_order() -> None:
    generation = Generation(make_prompt(0), 0)
    generation.extend([1, 2], [-0.5] * 2, 3)
    generation.extend([4], [-0.5], 3)
    generation.extend([5, 6], [-0.5] * 2, 4)
    assert generation.segments == [Segment(3, 0, 3), Segment(4, 3, 5)]
    generation.relabel(2, [Segment(3, 0, 2), Segment(5, 2, 3)])
    assert generation.segments == [Segment(3, 0, 4), Segment(5, 4, 5)]
    generation.cut(3)
    assert generation.segments == [Segment(3, 0, 3)] and len(generation.logprobs) == 3 and generation.lost == 2
    assert generation.request_ids.tolist() == [1, 2, 3, 1, 2, 4]
