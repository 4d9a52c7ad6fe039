"""Routes recorded by a real server: whose they are, under which weights, and that none is lost or invented."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from gspo_megatron.config.engine_sections import VllmMap
from gspo_megatron.controller import vllm_format
from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.server_client import ServerClient
from gspo_megatron.data.store import SampleStore
from gspo_megatron.transport.controller_client import ControllerClient
from gspo_megatron.transport.messages import EvaluationRequest, RolloutRequest
from gspo_megatron.transport.token_frames import Frame
from gspo_megatron.types import Problem, Prompt, SampleRef
from tests.rollout.conftest import ControllerThread, Server, make_run_dir, open_controller, running_servers
from tests.rollout.tiny import ARCH, KEY, VOCAB, Oracle, make_recipe
from tests.rollout.updates import TRAINER, update
from tests.shards import TrainerRanks

BLOCK = 32
"""Tokens of a block of the prefix cache."""
LONG = Prompt(0, Problem("long", "long", {}), tuple(np.random.default_rng(5).integers(4, VOCAB, 40).tolist()))
SAMPLED = Sampling(temperature=1.0, max_tokens=20, stop_ids=(), seed=3, routes=True)


def vllm(**more: object) -> VllmMap:
    return VllmMap.model_validate({"block_size": BLOCK, **more})


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """One as the product starts it, and one over two workers that takes prompts in parts of 16 tokens."""
    plain = make_run_dir(tmp_path_factory.mktemp("plain"), replay="sampler", vllm=vllm())
    parts = vllm(enable_chunked_prefill=True, max_num_batched_tokens=16)
    cut = make_run_dir(
        tmp_path_factory.mktemp("parts"), replay="sampler", vllm=parts, max_concurrency=8, tensor_parallel=2
    )
    with running_servers(plain, cut) as found:
        yield found


Starter = Callable[..., tuple[ControllerThread, ControllerClient]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Starts a controller of servers that records routes and lets responses outlive updates."""
    recipe = make_recipe()
    sections = {
        "objective": recipe.objective.model_copy(update={"replay": "sampler"}),
        "rollout": recipe.rollout.model_copy(update={"max_staleness": 1}),
    }
    with ExitStack() as stack:

        def start(servers: Sequence[Server], slots: int, overlaps: bool) -> tuple[ControllerThread, ControllerClient]:
            changed = recipe.model_copy(update=sections)
            return open_controller(stack, servers, tmp_path / "samples", changed, overlaps=overlaps, slots=slots)

        yield start


def under_way(controller: ControllerThread) -> list[Generation]:
    return [one for group in controller.controller.buffer.groups for one in group.generations]


def check_rows(rows: np.ndarray, token_ids: Sequence[int], oracle: Oracle, here: slice) -> None:
    wanted = oracle.routes(token_ids)[here]
    assert np.array_equal(np.sort(rows[here], axis=2), wanted)


def check_stored(store: SampleStore, refs: Sequence[SampleRef], oracles: Sequence[Oracle]) -> int:
    """Every token but the last has the experts that its version chooses; the largest number of versions of one."""
    for ref in refs:
        token_ids, start, _ = store.read(ref)
        rows = store.read_routes(ref)
        assert rows is not None and rows.dtype == np.uint8
        assert rows.shape == (len(token_ids) - 1, ARCH.num_hidden_layers, ARCH.num_experts_per_tok)
        for span in ref.segments:
            first = 0 if span.start == 0 else start + span.start - 1
            check_rows(rows, token_ids.tolist(), oracles[span.version], slice(first, start + span.end - 1))
    return max(len(ref.segments) for ref in refs)


@pytest.mark.parametrize("overlaps", [True, False], ids=["in-flight", "interrupted"])
def test_each_token_has_the_experts_of_its_own_version(servers, start: Starter, oracles, overlaps: bool) -> None:
    """Responses are continued in flight, after vLLM has forgotten their KV, or as new requests."""
    controller, link = start(servers[:1], 4 if overlaps else 12, overlaps)
    ranks = TrainerRanks(TRAINER.world)
    update(link, 0, oracles[0], ranks)
    first = link.rollout(RolloutRequest(step=0))
    while not overlaps and not any(0 < len(one) < 20 for one in under_way(controller)):
        first = link.rollout(RolloutRequest(step=0))
    update(link, 1, oracles[1], ranks)
    later = link.rollout(RolloutRequest(step=1))
    assert check_stored(controller.store, first.samples, oracles) == 1
    assert check_stored(controller.store, later.samples, oracles) == 2, "no response outlived the update"
    assert link.evaluate(EvaluationRequest(problems=2, answers=1, temperature=0.0)).problems == 2


def test_routes_of_three_versions_in_one_response(servers, start: Starter, oracles) -> None:
    _, link = start(servers[:1], 12, False)
    generation, ranks, three = Generation(LONG, 0), TrainerRanks(TRAINER.world), [*oracles, oracles[0]]

    async def go_on(version: int, until: int) -> None:
        client = ServerClient(servers[0].url, KEY, VOCAB, 64, 4)
        limited = Sampling(1.0, until, (), 3, routes=True)
        assert await client.generate(generation, limited, lambda: version) == "length"
        await client.close()

    for version, until in enumerate((6, 12, 20)):
        update(link, version, three[version], ranks)
        asyncio.run(go_on(version, until))
    rows = generation.routes.copy()
    assert rows is not None and [span.version for span in generation.segments] == [0, 1, 2]
    for span, first in zip(generation.segments, (0, 45, 51), strict=True):
        check_rows(rows, generation.request_ids, three[span.version], slice(first, 39 + span.end))


def test_prompts_of_the_prefix_cache_and_prompts_in_parts_have_their_routes(servers, start: Starter, oracles) -> None:
    async def ask(server: Server, number: int) -> np.ndarray:
        client = ServerClient(server.url, KEY, VOCAB, 64, 4)
        generation = Generation(LONG, number)
        request = vllm_format.sampling_request(generation, SAMPLED, 20)
        del request.parameters["seed"]  # vLLM's CPU build dies of a seeded request whose prompt is cut

        def take(frame: Frame) -> None:
            if frame.routes is not None:
                generation.routes.extend(frame.routes)
            generation.extend(frame.token_ids, frame.logprobs, 0)

        await client._ask(request, take)
        await client.close()
        rows = generation.routes.copy()
        assert rows is not None and len(rows) == len(generation.request_ids) - 1
        check_rows(rows, generation.request_ids, oracles[0], slice(0, len(rows)))
        return rows[:40]

    for server in servers:
        update(start([server], 8, False)[1], 0, oracles[0])
        first, second = (asyncio.run(ask(server, number)) for number in (0, 1))
        assert np.array_equal(first, second)
        hits = [line for line in server.ask("GET", "/metrics").text.splitlines() if "prefix_cache_hits_total{" in line]
        assert float(hits[0].split()[-1]) >= BLOCK, "the second prompt did not come out of the cache"
