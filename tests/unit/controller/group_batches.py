"""Recipes of a few prompts, and what the accounting of their batches must add up to."""

from __future__ import annotations

from typing import Any

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.controller import Controller
from gspo_megatron.models import parse_recipe
from gspo_megatron.transport.messages import RolloutBatch
from tests.unit.controller.controllers import RECIPE
from tests.unit.controller.fakes import FakeServer

ANSWERS = 3


def recipe(prompts: int = 4, limit: int = 12, filters: str = "none", **rollout: Any) -> Recipe:
    values = RECIPE.model_dump(mode="json")
    values["batch"] = {"prompts": prompts, "answers": ANSWERS, "updates": 1}
    values["rollout"] |= {"max_answer_tokens": limit, **rollout}
    values["objective"] |= {"group_filter": filters}
    return parse_recipe(values)


def set_version(controller: Controller, version: int, *servers: FakeServer) -> None:
    """What a weight update leaves behind."""
    controller.updater.version = version
    for server in servers:
        server.version = str(version)
    controller.scheduler.proceed()


def check_accounting(batch: RolloutBatch, controller: Controller, *servers: FakeServer) -> None:
    """What the controller counted is what the servers sampled; while some of it is on its way, no more than that."""
    reported = batch.accounting
    dropped = sum(counts.tokens for counts in reported.dropped.values())
    assert reported.sampled_tokens == reported.taken.tokens + dropped + reported.in_flight.tokens
    under_way = any(server.generations for server in controller.servers.all)
    uncounted = sum(server.tokens for server in servers) - reported.sampled_tokens
    assert uncounted >= 0 if under_way else uncounted == 0
    waiting = [ref for group in controller.buffer.groups for ref in group.finished.values()]
    assert all(controller._store.holds(ref) for ref in (*batch.samples, *waiting))
