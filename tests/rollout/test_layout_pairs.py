"""One update from each of several trainer layouts to servers of several layouts at once: twelve pairs, real servers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from gspo_megatron.transport.controller_client import ControllerError
from gspo_megatron.transport.messages import RolloutRequest
from gspo_megatron.transport.server_paths import GENERATE
from gspo_megatron.transport.weights.ipc import device_name
from gspo_megatron.transport.weights.wire import TransferError
from tests.rollout.conftest import KEY, Server, make_run_dir, running_servers
from tests.rollout.tiny import ARCH
from tests.rollout.updates import TRAINERS, differences, update, update_check, update_request
from tests.shards import CPU, TrainerRanks, cut_shards
from tests.waiting import HANG


@pytest.fixture(scope="module")
def sharded_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """TP2, PP2, and TP2 over two nodes, beside the TP1 server that all tests share."""
    root = tmp_path_factory.mktemp("sharded")
    run_dirs = [
        make_run_dir(root / "tp2", tensor_parallel=2),
        make_run_dir(root / "pp2", pipeline_parallel=2),
        make_run_dir(root / "nodes", tensor_parallel=2, server_nodes=2),
    ]
    with running_servers(*run_dirs) as servers:
        yield servers


def test_every_trainer_layout_reaches_every_server_layout(start_controller, sharded_servers, oracles) -> None:
    controller, link = start_controller(*sharded_servers)
    for server in sharded_servers:
        refused = server.ask("POST", GENERATE)
        assert refused.status_code == 409 and "has no weights" in refused.json()["error"]
    for version, trainer in enumerate(TRAINERS):
        oracle, other = oracles[version % 2], oracles[1 - version % 2]
        report = update(link, version, oracle, TrainerRanks(trainer.world), trainer)
        assert len(report.servers) == 4, link.status().servers
        assert max(server.largest for server in report.servers.values()) < 1e-4
        assert report.received_over_needed == 1.0
        # Prompts go round the servers, so that every one of them has sampled.
        batch = link.rollout(RolloutRequest(step=version))
        assert differences(oracle, controller.store, batch.samples).max() < 1e-4
        assert differences(other, controller.store, batch.samples).mean() > 0.1


def test_the_same_by_hand_over_while_trainer_and_servers_take_turns(
    start_controller, sharded_servers, oracles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GSPO_JOB_KEY", KEY)  # of the ranks, which are threads of this process
    controller, link = start_controller(*sharded_servers, overlaps=False, sleeps=True)
    for version, trainer in enumerate(TRAINERS):
        oracle, other = oracles[version % 2], oracles[1 - version % 2]
        report = update(link, version, oracle, TrainerRanks(trainer.world), trainer, shares=True)
        assert len(report.servers) == 4, link.status().servers
        assert max(server.largest for server in report.servers.values()) < 1e-4
        assert report.received_over_needed == 1.0
        batch = link.rollout(RolloutRequest(step=version))
        assert differences(oracle, controller.store, batch.samples).max() < 1e-4
        assert differences(other, controller.store, batch.samples).mean() > 0.1
        link.sleep()
        with pytest.raises(ControllerError, match="no server has weights"):
            link.rollout(RolloutRequest(step=version))


def test_a_server_killed_in_the_middle_never_serves_and_the_others_go_on(
    start_controller, sharded_servers, oracles
) -> None:
    """Comes late here: it ends a server."""
    controller, link = start_controller(*sharded_servers)
    old, new = oracles
    ranks = TrainerRanks(TRAINERS[0].world)
    update(link, 0, old, ranks, TRAINERS[0])
    ticket = link.begin_update(update_request(1, ARCH, "float32", TRAINERS[0]))
    killed = sharded_servers[0]
    os.killpg(killed.process.pid, signal.SIGKILL)
    with pytest.raises(TransferError, match="the weight update broke between the trainer and the servers"):
        ranks.send(ticket, cut_shards(ARCH, TRAINERS[0], new.tensors))
    report = update(link, 1, new, ranks, TRAINERS[0])
    assert len(report.servers) == 3 and killed.url not in report.servers
    assert "gone" in link.status().servers[killed.url]
    batch = link.rollout(RolloutRequest(step=1))
    assert differences(new, controller.store, batch.samples).max() < 1e-4
    assert {segment.version for ref in batch.samples for segment in ref.segments} == {1}


def test_by_hand_over_a_killed_server_takes_nothing_from_the_others(
    start_controller, sharded_servers, oracles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comes late here: it ends another server of this file."""
    monkeypatch.setenv("GSPO_JOB_KEY", KEY)
    killed = sharded_servers[1]
    controller, link = start_controller(killed, overlaps=False, sleeps=True)
    old, new = oracles
    ranks = TrainerRanks(TRAINERS[0].world)
    update(link, 0, old, ranks, TRAINERS[0], shares=True)
    link.sleep()
    ticket = link.begin_update(update_request(1, ARCH, "float32", TRAINERS[0], [device_name(CPU)] * TRAINERS[0].world))
    os.killpg(killed.process.pid, signal.SIGKILL)
    checksums = ranks.send(ticket, cut_shards(ARCH, TRAINERS[0], new.tensors))
    report = link.finish_update(update_check(1, checksums, new.probes()))
    assert len(report.servers) == 1 and killed.url not in report.servers
    batch = link.rollout(RolloutRequest(step=1))
    assert differences(new, controller.store, batch.samples).max() < 1e-4


def test_a_part_of_a_server_that_loses_its_worker_ends_with_its_sentence(sharded_servers) -> None:
    """Comes last here. Nobody but the launcher can tell the first node's part, which waits for that worker."""
    server = sharded_servers[2]
    (part,) = server.parts
    (worker,) = [child for child in psutil.Process(part.pid).children() if "Worker" in child.name()]
    worker.kill()
    assert part.wait(HANG) == 1
    assert "rollout server 0 died: RuntimeError: a worker of this node's part died" in server.log.read_text()
