"""The state machine of a weight update: the order of its steps, and that a failure anywhere never serves."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from gspo_megatron.config.schema import WeightUpdateSection
from gspo_megatron.controller.servers import Refused, ServerSet
from gspo_megatron.controller.weight_update import WeightUpdater
from gspo_megatron.models.vllm_layout import ServerLayout
from gspo_megatron.transport.messages import Empty
from gspo_megatron.transport.update_messages import Probe, UpdateCheck, UpdateRequest
from tests.unit.controller.fakes import FakeServer, serving
from tests.unit.controller.weight_terms import TERMS, NoStore

PROBES = [Probe(token_ids=(1, 2, 3), logprobs=(-1.0, -1.0)), Probe(token_ids=(4, 5), logprobs=(-1.00003,))]
CHECKSUM = 77


def check(version: int, checksums: Sequence[int], probes: Sequence[Probe]) -> UpdateCheck:
    return UpdateCheck(version=version, checksums=tuple(checksums), probes=tuple(probes))


@asynccontextmanager
async def updating(*servers: FakeServer, sleeps: bool = False) -> AsyncIterator[WeightUpdater]:
    for server in servers:
        server.checksum = str(CHECKSUM)
    async with serving(*servers) as clients:
        settings = WeightUpdateSection(canary_bound=1e-3, timeout=5)
        updater = WeightUpdater(ServerSet(clients), settings, "127.0.0.1", sleeps)
        updater._store = NoStore()  # type: ignore[assignment]
        yield updater


async def test_steps_come_in_order_and_the_report_is_complete() -> None:
    fake = FakeServer()
    async with updating(fake) as updater:
        ticket = await updater.begin(UpdateRequest(version=4, terms=TERMS))
        assert (ticket.store_host, ticket.bucket_mib, ticket.terms.dtype) == ("127.0.0.1", 64, "float32")
        assert ticket.servers == (ServerLayout(),)
        assert updater.version is None, "while an update is under way nothing serves"
        report = await updater.finish(check(4, [CHECKSUM], PROBES))
        assert updater.version == 4
    assert report.largest == pytest.approx(3e-5) and report.mean == pytest.approx(1e-5)
    assert report.transfer_seconds == 0.1 and report.received_over_needed == 1.0
    assert list(report.servers) == [fake.url]
    assert fake.calls == [
        "/pause",
        "/is_paused",
        "/collective_rpc",
        "/weight_info",
        "/collective_rpc",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/collective_rpc",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/resume",
        "/gspo/generate",
    ], "the probes are scored together"
    assert fake.version == "4"


async def test_servers_that_share_devices_take_weights_and_kv_one_after_the_other() -> None:
    fake = FakeServer()
    async with updating(fake, sleeps=True) as updater:
        await updater.begin(UpdateRequest(version=0, terms=TERMS))
        await updater.finish(check(0, [CHECKSUM], PROBES))
        fake.calls.clear()
        await updater.sleep(Empty())
        assert updater.version is None and fake.calls == ["/sleep"], "what sleeps serves nothing"
        await updater.begin(UpdateRequest(version=1, terms=TERMS))
        assert fake.calls[1:4] == ["/wake_up weights", "/pause", "/is_paused"], "no KV while the trainer has room"
        await updater.finish(check(1, [CHECKSUM], PROBES))
        last = fake.calls.index("/finish_weight_update")
        assert fake.calls[last : last + 4] == [
            "/finish_weight_update", "/wake_up kv_cache", "/reset_prefix_cache", "/resume"
        ]  # fmt: skip


async def test_servers_of_their_own_devices_do_not_sleep() -> None:
    async with updating(FakeServer()) as updater:
        with pytest.raises(Refused, match="have devices of their own and do not sleep"):
            await updater.sleep(Empty())


async def test_every_worker_has_a_proxy_on_its_device() -> None:
    servers = [FakeServer() for _ in range(4)]
    for server, device in zip(servers, ("a", "b", "b", "elsewhere"), strict=True):
        server.device = device
    async with updating(*servers) as updater:
        ticket = await updater.begin(UpdateRequest(version=0, terms=TERMS, devices=("b", "a", "b", "c")))
        assert ticket.proxies == (1, 0, 2) and len(ticket.servers) == 3
        assert "is on a device with no trainer rank (elsewhere)" in updater._servers.faults()[servers[3].url]


@pytest.mark.parametrize(
    "path",
    [
        "/pause",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/collective_rpc",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/resume",
        "/gspo/generate",
    ],
)
async def test_a_server_that_fails_anywhere_is_out_and_the_other_serves(path: str) -> None:
    good, bad = FakeServer(), FakeServer()
    bad.fail[path] = 500
    async with updating(bad, good) as updater:
        await updater.begin(UpdateRequest(version=0, terms=TERMS))
        report = await updater.finish(check(0, [CHECKSUM] * 2, PROBES))
        assert list(report.servers) == [good.url] and updater.version == 0
        assert [server.url for server in updater._servers.live] == [good.url]
        first_group = (await updater.begin(UpdateRequest(version=1, terms=TERMS))).group
        await updater.finish(check(1, [CHECKSUM], PROBES))
        second_group = (await updater.begin(UpdateRequest(version=2, terms=TERMS))).group
        assert first_group == second_group, "an unchanged set of servers keeps its connections"
        await updater.finish(check(2, [CHECKSUM], PROBES))
        good.version = "default"
        third_group = (await updater.begin(UpdateRequest(version=3, terms=TERMS))).group
        assert third_group != second_group, "one that was started again is no member of the old group"
    after = bad.calls.index(path) + 1
    assert "/resume" not in bad.calls[after:] and bad.calls.count("/init_weight_transfer_engine") <= 1


async def test_the_last_server_ends_the_job_with_its_reason() -> None:
    fake = FakeServer()
    fake.fail["/update_weights"] = 500
    async with updating(fake) as updater:
        await updater.begin(UpdateRequest(version=0, terms=TERMS))
        with pytest.raises(Refused, match=r"no server is left: .*/update_weights with 500"):
            await updater.finish(check(0, [CHECKSUM], PROBES))
        assert updater.version is None


async def test_a_wrong_checksum_never_reaches_the_model() -> None:
    fake = FakeServer()
    async with updating(fake) as updater:
        await updater.begin(UpdateRequest(version=0, terms=TERMS))
        with pytest.raises(Refused, match="received weights with checksums 77 where the trainer sent 78"):
            await updater.finish(check(0, [CHECKSUM + 1], PROBES))
    assert "/finish_weight_update" not in fake.calls and "/resume" not in fake.calls


@pytest.mark.parametrize("score", [-1.002, math.nan])
async def test_the_canary_stops_wrong_weights_and_nan(score: float) -> None:
    fake = FakeServer()
    fake.score = score
    async with updating(fake) as updater:
        await updater.begin(UpdateRequest(version=0, terms=TERMS))
        with pytest.raises(Refused, match=r"the canary refuses version 0 .*weight_update.canary_bound=0.001"):
            await updater.finish(check(0, [CHECKSUM], PROBES))
        assert updater.version is None


async def test_versions_only_grow_and_finish_needs_its_begin() -> None:
    async with updating(FakeServer()) as updater:
        with pytest.raises(Refused, match="no update to version 0 is in flight"):
            await updater.finish(check(0, [CHECKSUM], PROBES))
        await updater.begin(UpdateRequest(version=3, terms=TERMS))
        with pytest.raises(Refused, match="no update to version 2 is in flight"):
            await updater.finish(check(2, [CHECKSUM], PROBES))
        await updater.begin(UpdateRequest(version=3, terms=TERMS))  # the trainer starts over
        await updater.finish(check(3, [CHECKSUM], PROBES))
        with pytest.raises(Refused, match="weights of version 3 cannot follow version 3"):
            await updater.begin(UpdateRequest(version=3, terms=TERMS))


async def test_a_probe_with_too_many_log_probs_is_the_callers_fault() -> None:
    async with updating(FakeServer()) as updater:
        await updater.begin(UpdateRequest(version=0, terms=TERMS))
        with pytest.raises(Refused, match="probe 0 has 2 tokens and 2 log-probs"):
            await updater.finish(check(0, [CHECKSUM], [Probe(token_ids=(1, 2), logprobs=(-1.0, -1.0))]))
        assert updater.version is None
