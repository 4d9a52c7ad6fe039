"""The state machine of a weight update: the order of its steps, and that a failure anywhere never serves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gspo_megatron.config.schema import WeightUpdateSection
from gspo_megatron.controller.servers import Refused, ServerSet
from gspo_megatron.controller.weight_update import Probe, WeightUpdater
from tests.unit.controller.fakes import FakeServer, serving

PROBES = [Probe([1, 2, 3], [-1.0, -1.0]), Probe([4, 5], [-1.00003])]
CHECKSUM = 77
TERMS = {"architecture": {}, "dtype": "float32", "trainer": {}}


class NoStore:
    port = 1


@asynccontextmanager
async def updating(*servers: FakeServer, sleeps: bool = False) -> AsyncIterator[WeightUpdater]:
    for server in servers:
        server.checksum = str(CHECKSUM)
    async with serving(*servers) as clients:
        settings = WeightUpdateSection(canary_bound=1e-3, timeout=5)
        updater = WeightUpdater(ServerSet(clients), settings, "127.0.0.1", sleeps)
        updater._store = NoStore()
        yield updater


def test_steps_come_in_order_and_the_report_is_complete() -> None:
    async def run() -> None:
        fake = FakeServer()
        async with updating(fake) as updater:
            ticket = await updater.begin(4, TERMS)
            assert (ticket["store_host"], ticket["bucket_mib"], ticket["dtype"]) == ("127.0.0.1", 64, "float32")
            assert ticket["servers"] == [{"tensor": 1, "pipeline": 1, "data": 1, "expert_parallel": False}]
            assert updater.version is None, "while an update is under way nothing serves"
            report = await updater.finish(4, [CHECKSUM], PROBES)
            assert updater.version == 4
        assert report["largest"] == pytest.approx(3e-5) and report["mean"] == pytest.approx(1e-5)
        assert report["transfer_seconds"] == 0.1 and report["received_over_needed"] == 1.0
        assert list(report["servers"]) == [fake.url]
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
            "/inference/v1/generate",
            "/inference/v1/generate",
        ]
        assert fake.version == "4"

    asyncio.run(run())


def test_servers_that_share_devices_take_weights_and_kv_one_after_the_other() -> None:
    async def run() -> None:
        fake = FakeServer()
        async with updating(fake, sleeps=True) as updater:
            await updater.begin(0, TERMS)
            await updater.finish(0, [CHECKSUM], PROBES)
            fake.calls.clear()
            await updater.sleep()
            assert updater.version is None and fake.calls == ["/sleep"], "what sleeps serves nothing"
            await updater.begin(1, TERMS)
            assert fake.calls[1:4] == ["/wake_up weights", "/pause", "/is_paused"], "no KV while the trainer has room"
            await updater.finish(1, [CHECKSUM], PROBES)
            last = fake.calls.index("/finish_weight_update")
            assert fake.calls[last : last + 4] == [
                "/finish_weight_update", "/wake_up kv_cache", "/reset_prefix_cache", "/resume"
            ]  # fmt: skip

    asyncio.run(run())


def test_servers_of_their_own_devices_do_not_sleep() -> None:
    async def run() -> None:
        async with updating(FakeServer()) as updater:
            with pytest.raises(Refused, match="have devices of their own and do not sleep"):
                await updater.sleep()

    asyncio.run(run())


def test_every_worker_has_a_proxy_on_its_device() -> None:
    async def run() -> None:
        servers = [FakeServer() for _ in range(4)]
        for server, device in zip(servers, ("a", "b", "b", "elsewhere"), strict=True):
            server.device = device
        async with updating(*servers) as updater:
            ticket = await updater.begin(0, TERMS, ["b", "a", "b", "c"])
            assert ticket["proxies"] == [1, 0, 2] and len(ticket["servers"]) == 3
            assert "is on a device with no trainer rank (elsewhere)" in updater._servers.faults()[servers[3].url]

    asyncio.run(run())


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
        "/inference/v1/generate",
    ],
)
def test_a_server_that_fails_anywhere_is_out_and_the_other_serves(path: str) -> None:
    async def run() -> None:
        good, bad = FakeServer(), FakeServer()
        bad.fail[path] = 500
        async with updating(bad, good) as updater:
            await updater.begin(0, TERMS)
            report = await updater.finish(0, [CHECKSUM] * 2, PROBES)
            assert list(report["servers"]) == [good.url] and updater.version == 0
            assert [server.url for server in updater._servers.live] == [good.url]
            first_group = (await updater.begin(1, TERMS))["group"]
            await updater.finish(1, [CHECKSUM], PROBES)
            second_group = (await updater.begin(2, TERMS))["group"]
            assert first_group == second_group, "an unchanged set of servers keeps its connections"
            await updater.finish(2, [CHECKSUM], PROBES)
            good.version = "default"
            third_group = (await updater.begin(3, TERMS))["group"]
            assert third_group != second_group, "one that was started again is no member of the old group"
        after = bad.calls.index(path) + 1
        assert "/resume" not in bad.calls[after:] and bad.calls.count("/init_weight_transfer_engine") <= 1

    asyncio.run(run())


def test_the_last_server_ends_the_job_with_its_reason() -> None:
    async def run() -> None:
        fake = FakeServer()
        fake.fail["/update_weights"] = 500
        async with updating(fake) as updater:
            await updater.begin(0, TERMS)
            with pytest.raises(Refused, match=r"no server is left: .*/update_weights with 500"):
                await updater.finish(0, [CHECKSUM], PROBES)
            assert updater.version is None

    asyncio.run(run())


def test_a_wrong_checksum_never_reaches_the_model() -> None:
    async def run() -> None:
        fake = FakeServer()
        async with updating(fake) as updater:
            await updater.begin(0, TERMS)
            with pytest.raises(Refused, match="received weights with checksums 77 where the trainer sent 78"):
                await updater.finish(0, [CHECKSUM + 1], PROBES)
        assert "/finish_weight_update" not in fake.calls and "/resume" not in fake.calls

    asyncio.run(run())


@pytest.mark.parametrize("score", [-1.002, math.nan])
def test_the_canary_stops_wrong_weights_and_nan(score: float) -> None:
    async def run() -> None:
        fake = FakeServer()
        fake.score = score
        async with updating(fake) as updater:
            await updater.begin(0, TERMS)
            with pytest.raises(Refused, match=r"the canary refuses version 0 .*weight_update.canary_bound=0.001"):
                await updater.finish(0, [CHECKSUM], PROBES)
            assert updater.version is None

    asyncio.run(run())


def test_versions_only_grow_and_finish_needs_its_begin() -> None:
    async def run() -> None:
        async with updating(FakeServer()) as updater:
            with pytest.raises(Refused, match="no update to version 0 is under way"):
                await updater.finish(0, [CHECKSUM], PROBES)
            await updater.begin(3, TERMS)
            with pytest.raises(Refused, match="no update to version 2 is under way"):
                await updater.finish(2, [CHECKSUM], PROBES)
            await updater.begin(3, TERMS)  # the trainer starts over
            await updater.finish(3, [CHECKSUM], PROBES)
            with pytest.raises(Refused, match="weights of version 3 cannot follow version 3"):
                await updater.begin(3, TERMS)

    asyncio.run(run())


def test_a_probe_with_too_many_log_probs_is_the_callers_fault() -> None:
    async def run() -> None:
        async with updating(FakeServer()) as updater:
            await updater.begin(0, TERMS)
            with pytest.raises(Refused, match="probe 0 has 2 tokens and 2 log-probs"):
                await updater.finish(0, [CHECKSUM], [Probe([1, 2], [-1.0, -1.0])])
            assert updater.version is None

    asyncio.run(run())
