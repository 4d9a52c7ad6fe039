"""The table of roles over hosts: one for a machine and for a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.cluster.hosts import Host, Ports, spread, tasks
from gspo_megatron.cluster.placement import findings
from gspo_megatron.config import Recipe
from gspo_megatron.models import load_recipe
from tests.places import GOLDEN

RECIPE = GOLDEN / "moe.yaml"
RUN = Path("runs/x")


def nodes(count: int) -> list[Host]:
    return [Host(f"node{n}", f"10.0.0.{n}") for n in range(1, count + 1)]


def recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, overrides)


def test_disaggregated_ranks_fill_nodes_in_order_and_servers_take_the_last() -> None:
    wanted = recipe("placement.rollout_nodes=2", "rollout.servers=4")
    over = spread(wanted, nodes(5), gpus=8)
    assert (over.world, over.ranks, over.servers_each, over.colocated) == (24, 8, 2, False)
    table = tasks(wanted, over, Ports.of_job(7), RUN)
    trainers = [task for task in table if task.kind == "trainer"]
    assert [(task.index, task.host.name, task.local) for task in trainers[7:9]] == [(7, "node1", 7), (8, "node2", 0)]
    assert trainers[23].environment["RANK"] == "23" and trainers[23].environment["MASTER_ADDR"] == "10.0.0.1"
    servers = [task for task in table if task.kind == "rollout"]
    assert [task.host.name for task in servers] == ["node4", "node4", "node5", "node5"]
    assert [task.environment["CUDA_VISIBLE_DEVICES"] for task in servers] == ["0,1,2,3", "4,5,6,7"] * 2
    assert {task.restarts for task in servers} == {3} and not any(task.restarts for task in table[len(servers) :])
    # 20000 + 16 * 7 = 20112 is the rendezvous; then the controller; then the servers of a host.
    assert [task.ports for task in servers] == [(20114,), (20115,)] * 2
    controller = next(task for task in table if task.kind == "controller")
    urls = controller.arguments[-1].split(",")
    assert urls == ["http://10.0.0.4:20114", "http://10.0.0.4:20115", "http://10.0.0.5:20114", "http://10.0.0.5:20115"]
    assert controller.host.name == "node1" and "10.0.0.1" in controller.arguments


def test_colocated_servers_share_the_first_trainer_nodes() -> None:
    over = spread(recipe("rollout.servers=2"), nodes(4), gpus=8)
    assert over.colocated and [host.name for host in over.servers] == ["node1", "node2"] and over.servers_each == 1
    assert over.world == 32


def test_a_server_larger_than_a_node_spans_nodes_and_has_them_for_itself() -> None:
    wanted = recipe(
        "placement.rollout_nodes=4",
        "rollout.servers=2",
        "rollout.tensor_parallel=8",
        "rollout.pipeline_parallel=2",
    )
    assert not list(findings(wanted, 5, 8))
    over = spread(wanted, nodes(5), gpus=8)
    assert (over.servers_each, over.server_nodes) == (1, 2)
    table = tasks(wanted, over, Ports.of_job(7), RUN)
    parts = [task for task in table if task.kind == "rollout"]
    assert [task.name for task in parts] == ["rollout-0", "rollout-0.1", "rollout-1", "rollout-1.1"]
    assert [task.host.name for task in parts] == ["node2", "node3", "node4", "node5"]
    assert {task.environment["CUDA_VISIBLE_DEVICES"] for task in parts} == {"0,1,2,3,4,5,6,7"}
    assert not any(task.restarts for task in parts), "a part cannot come back alone"
    # Only the first part of each listens: for requests, and where its parts meet.
    assert [task.ports for task in parts] == [(20114, 20115), ()] * 2
    assert parts[3].arguments[-6:] == ("--part", "1", "--of", "2", "--meet", "10.0.0.4:20115")
    controller = next(task for task in table if task.kind == "controller")
    assert controller.arguments[-1] == "http://10.0.0.2:20114,http://10.0.0.4:20114"


def test_without_gpus_a_server_spans_nodes_if_the_recipe_says_so() -> None:
    wanted = recipe("rollout.servers=1", "placement.server_nodes=2")
    assert not list(findings(wanted, 2, 0))
    over = spread(wanted, nodes(2), gpus=0)
    assert over.colocated and [host.name for host in over.servers] == ["node1", "node2"]
    assert "CUDA_VISIBLE_DEVICES" not in tasks(wanted, over, Ports.of_job(1), RUN)[1].environment


def test_without_gpus_there_are_two_ranks_a_node_or_as_many_as_the_recipe_says() -> None:
    assert spread(recipe(), nodes(3), gpus=0).world == 6
    over = spread(recipe("trainer.ranks=4"), nodes(2), gpus=0)
    assert (over.world, over.ranks) == (4, 2)
    assert all("CUDA_VISIBLE_DEVICES" not in task.environment for task in tasks(recipe(), over, Ports.of_job(1), RUN))


def test_ports_of_jobs_that_run_together_are_apart_and_below_the_ephemeral_range() -> None:
    seen: set[int] = set()
    for job in range(1000, 1750):
        ports = Ports.of_job(job)
        own = {ports.rendezvous, ports.controller, *ports.servers}
        assert not own & seen
        assert min(own) >= 20000 and max(own) < 32000
        seen |= own


@pytest.mark.parametrize(
    ("overrides", "hosts", "gpus", "code"),
    [
        (("placement.rollout_nodes=2",), 2, 8, "no-trainer-nodes"),
        (("trainer.ranks=24",), 2, 8, "more-ranks-than-gpus"),
        (("trainer.ranks=9",), 2, 8, "ranks-uneven-on-nodes"),
        (("rollout.servers=3",), 2, 8, "servers-uneven-on-nodes"),
        (("placement.rollout_nodes=2",), 4, 8, "servers-uneven-on-nodes"),
        (("rollout.servers=3", "rollout.tensor_parallel=4"), 1, 8, "servers-exceed-gpus"),
        (("rollout.tensor_parallel=16", "placement.server_nodes=1"), 2, 8, "servers-exceed-gpus"),
        (("rollout.tensor_parallel=16", "placement.server_nodes=2"), 4, 4, "servers-exceed-gpus"),
        (("rollout.tensor_parallel=16",), 1, 8, "servers-uneven-on-nodes"),
        (("rollout.tensor_parallel=16", "rollout.servers=2"), 2, 8, "servers-uneven-on-nodes"),
        (("rollout.tensor_parallel=16", "placement.rollout_nodes=3"), 4, 8, "servers-uneven-on-nodes"),
        (("placement.server_nodes=3",), 3, 8, "server-uneven-on-nodes"),
        (("trainer.ranks=4", "rollout.tensor_parallel=4"), 2, 8, "server-without-trainer-rank"),
        (("rollout.servers=15", "rollout.tensor_parallel=1"), 1, 0, "servers-exceed-ports"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(overrides: tuple[str, ...], hosts: int, gpus: int, code: str) -> None:
    found = list(findings(recipe(*overrides), hosts, gpus))
    assert [finding.code for finding in found] == [code]
    assert found[0].severity == "error" and found[0].fix


@pytest.mark.parametrize("count", [1, 2, 7])
def test_what_fits_has_no_finding(count: int) -> None:
    assert not list(findings(recipe(f"rollout.servers={2 * count}"), count, 8))
