"""What a real server says of itself, and that one of another run or model gets neither a request nor a weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gspo_megatron.transport.controller_client import ControllerError
from gspo_megatron.transport.identity import Identity, identity_of, read_run_id
from tests.rollout.conftest import Server
from tests.rollout.test_weight_update import update
from tests.rollout.tiny import make_recipe


@pytest.fixture
def identity(run_dir: Path) -> Identity:
    return identity_of(make_recipe(), run_dir)


def of_another_width(identity: Identity) -> Identity:
    return replace(identity, architecture=identity.architecture.model_copy(update={"moe_intermediate_size": 96}))


def test_the_run_s_own_server_is_taken(start_controller, oracles, identity: Identity, run_dir: Path) -> None:
    assert read_run_id(run_dir) == identity.run and len(identity.run) == 16
    _, link = start_controller(identity=identity)
    update(link, 0, oracles[0])
    assert len(link.rollout(1)["samples"]) == 32


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda own: replace(own, run="another"), "belongs to run [0-9a-f]{16}, this is run another"),
        (of_another_width, "serves another model: moe_intermediate_size is 64 there and 96 in the recipe"),
        (lambda own: replace(own, dtype="bfloat16"), "serves another model: dtype is float32 there and bfloat16"),
        (lambda own: replace(own, tokenizer="0123"), "another vocabulary: hash of none there and 0123 here"),
        (lambda own: replace(own, context=65), "takes 64 tokens, prompt and answer of this recipe may have 65"),
    ],
)
def test_another_is_refused_before_anything_is_asked_of_it(
    start_controller, server: Server, identity: Identity, change, sentence: str
) -> None:
    with pytest.raises(ControllerError, match=f"server {server.url} .*{sentence}"):
        start_controller(identity=change(identity))


def test_a_process_that_took_an_address_over_gets_no_weight(
    start_controller, server: Server, oracles, identity: Identity
) -> None:
    controller, link = start_controller(identity=identity)
    update(link, 0, oracles[0])
    controller.controller.servers._identity = replace(identity, run="another")
    with pytest.raises(ControllerError, match=r"no server is left: .* belongs to run"):
        update(link, 1, oracles[1])
    assert server.ask("GET", "/is_paused").json() == {"is_paused": False}
    assert server.ask("GET", "/weight_info").json()["weight_version"] == "0"
