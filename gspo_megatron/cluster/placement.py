"""Whether the roles of a recipe fit on so many hosts with so many GPUs each."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding

SERVERS_PER_HOST = 14
"""As many as have ports; see `hosts.Ports`."""


def findings(recipe: Recipe, hosts: int, gpus: int) -> Iterator[Finding]:
    """Why a recipe does not fit on so many hosts with so many GPUs each."""
    apart = recipe.placement.rollout_nodes
    if apart >= hosts:
        yield _error(
            "no-trainer-nodes", "placement.rollout_nodes",
            f"{apart} of {hosts} nodes run servers: none is left to train",
            f"ask for more nodes (--nodes={apart + 1} or more), or set it below {hosts}; 0 = on the trainer's nodes",
        )  # fmt: skip
        return
    training, serving = hosts - apart, apart or hosts
    ranks = recipe.trainer.ranks
    if ranks is not None and ranks % training:
        yield _error(
            "ranks-uneven-on-nodes", "trainer.ranks",
            f"{ranks} ranks do not divide over {training} trainer nodes", f"choose a multiple of {training}, or null",
        )  # fmt: skip
    elif ranks is not None and gpus and ranks // training > gpus:
        yield _error(
            "more-ranks-than-gpus", "trainer.ranks",
            f"{ranks} ranks on {training} trainer nodes are {ranks // training} a node, which has {gpus} GPUs",
            "set trainer.ranks=null (one rank a GPU) or take more nodes",
        )  # fmt: skip
    yield from _server_findings(recipe, serving, gpus, apart > 0)
    span = server_nodes(recipe, gpus)
    each = max(1, recipe.rollout.servers * span // serving) * server_gpus(recipe) // span
    if gpus and not apart and ranks is not None and ranks // training < each <= gpus:
        yield _error(
            "server-without-trainer-rank", "trainer.ranks",
            f"{ranks // training} ranks a node leave {each - ranks // training} GPUs of its servers without one, which "
            "could hand over their weights",
            "set trainer.ranks=null (one rank a GPU), or placement.rollout_nodes to nodes that only run servers",
        )  # fmt: skip


def server_gpus(recipe: Recipe) -> int:
    """GPUs of one server."""
    return recipe.rollout.tensor_parallel * recipe.rollout.pipeline_parallel


def server_nodes(recipe: Recipe, gpus: int) -> int:
    """Nodes of so many GPUs that one server spans: what the recipe says, or as few as have its GPUs."""
    return recipe.placement.server_nodes or (-(-server_gpus(recipe) // gpus) if gpus else 1)


def span_findings(recipe: Recipe, nodes: int, gpus: int, apart: bool) -> Iterator[Finding]:
    """Why servers larger than a node, or spread by the recipe, do not fit; nothing for servers of one node that fit it.

    Args:
        recipe: the run.
        nodes: nodes that may run servers.
        gpus: of each; 0 = none.
        apart: whether they only run servers.
    """
    servers, size, span = recipe.rollout.servers, server_gpus(recipe), server_nodes(recipe, gpus)
    if size % span:
        yield _error(
            "server-uneven-on-nodes", "placement.server_nodes",
            f"the {size} ranks of a server do not divide over {span} nodes",
            f"choose rollout.tensor_parallel * rollout.pipeline_parallel as a multiple of {span}",
        )  # fmt: skip
    elif gpus and size // span > gpus:
        yield _error(
            "servers-exceed-gpus", "placement.server_nodes",
            f"a server of {size} GPUs on {span} node(s) needs {size // span} of each, which has {gpus}",
            f"set it to null or at least {-(-size // gpus)}, or take smaller servers",
        )  # fmt: skip
    elif span > 1 and apart and nodes % span:
        yield _error(
            "servers-uneven-on-nodes", "placement.rollout_nodes",
            f"servers of {span} nodes each do not divide over {nodes} nodes", f"choose a multiple of {span}",
        )  # fmt: skip
    elif span > 1 and (servers * span > nodes or (apart and servers * span < nodes)):
        yield _error(
            "servers-uneven-on-nodes", "rollout.servers",
            f"{servers} servers of {span} nodes each take {servers * span} nodes for themselves, {nodes} are there",
            f"choose {nodes // span}" if nodes >= span else "take more nodes, or a smaller server",
        )  # fmt: skip


def _server_findings(recipe: Recipe, nodes: int, gpus: int, apart: bool) -> Iterator[Finding]:
    found = list(span_findings(recipe, nodes, gpus, apart))
    yield from found
    if found or server_nodes(recipe, gpus) > 1:
        return
    servers, size = recipe.rollout.servers, server_gpus(recipe)
    if servers % nodes and (servers > nodes or apart):
        yield _error(
            "servers-uneven-on-nodes", "rollout.servers", f"{servers} servers do not divide over {nodes} nodes",
            f"choose a multiple of {nodes}" + (", or another placement.rollout_nodes" if apart else ""),
        )  # fmt: skip
        return
    each = max(1, servers // nodes)
    if gpus and each * size > gpus:
        yield _error(
            "servers-exceed-gpus", "rollout.servers",
            f"{each} servers of {size} GPUs on one node need {each * size}, it has {gpus}",
            f"take at most {gpus // size * nodes} servers, or smaller ones",
        )  # fmt: skip
    if each > SERVERS_PER_HOST:
        yield _error(
            "servers-exceed-ports", "rollout.servers",
            f"{each} servers on one node, where {SERVERS_PER_HOST} have ports", "take fewer, larger servers",
        )  # fmt: skip


def _error(code: str, key: str, message: str, fix: str) -> Finding:
    return Finding(code, "error", key, message, fix)
