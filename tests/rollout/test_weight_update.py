"""Live weight updates: right weights serve and equal Hugging Face, wrong ones never serve."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from gspo_megatron.models.hf_table import hf_shapes
from gspo_megatron.models.weight_format import WeightFormat
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.controller_client import ControllerError
from gspo_megatron.transport.messages import RolloutRequest
from gspo_megatron.transport.weights.checksum import Checksum
from gspo_megatron.transport.weights.plan import Slice
from gspo_megatron.transport.weights.wire import TransferError
from tests.rollout.tiny import ARCH, Oracle
from tests.rollout.updates import TRAINER, differences, update, update_check, update_request
from tests.shards import CPU, TrainerRanks, cut_shards


def checksum_of(oracle: Oracle) -> int:
    """What a worker that holds the whole model must have received."""
    checksum = Checksum(ARCH, WeightFormat("float32"), CPU)
    for name, value in oracle.tensors.items():
        matrix = value if value.dim() > 1 else value[:, None]
        checksum.add(0, [Slice(name, 0, 0, *matrix.shape, parameter=name, at=(0, 0, 0))], matrix[None])
    return checksum.values()[0]


def test_two_updates_with_different_weights(start_controller, oracles) -> None:
    controller, client = start_controller()
    ranks = TrainerRanks(TRAINER.world)
    with pytest.raises(ControllerError, match="no server has weights"):
        client.rollout(RolloutRequest(step=0))
    for version, oracle in enumerate(oracles):
        report = update(client, version, oracle, ranks)
        assert report.largest < 1e-4 and report.mean < 1e-5
        assert report.received_over_needed == 1.0
        batch = client.rollout(RolloutRequest(step=version))
        found = differences(oracle, controller.store, batch.samples)
        assert len(found) == batch.tokens
        assert found.max() < 1e-4 and found.mean() < 1e-5
        other = differences(oracles[1 - version], controller.store, batch.samples)
        assert other.mean() > 0.1, "both models give the same log-probs: the test cannot tell them apart"
        assert all([segment.version for segment in ref.segments] == [version] for ref in batch.samples)
    with pytest.raises(ControllerError, match="versions only grow"):
        client.begin_update(update_request(1, ARCH, "float32", TRAINER))


def test_one_changed_value_is_refused_by_the_checksum(start_controller, oracles) -> None:
    """The sum is that of the right weights, but one value was another on the wire."""
    _, controller = start_controller()
    shards = cut_shards(ARCH, TRAINER, oracles[0].tensors)
    ticket = controller.begin_update(update_request(0, ARCH, "float32", TRAINER))
    shards[3]["decoder.layers.2.mlp.experts.5.linear_fc1.weight"][3, 4] += 1e-3
    TrainerRanks(TRAINER.world).send(ticket, shards)
    with pytest.raises(ControllerError, match=r"no server is left: .* received weights with checksums"):
        controller.finish_update(update_check(0, [checksum_of(oracles[0])], oracles[0].probes()))
    with pytest.raises(ControllerError, match="no server"):
        controller.rollout(RolloutRequest(step=0))


def test_weights_that_are_not_the_trainers_are_refused_by_the_canary(start_controller, oracles) -> None:
    """The transfer is faultless, but the trainer computes with other weights than it sent."""
    _, controller = start_controller()
    sent, held = oracles
    ticket = controller.begin_update(update_request(0, ARCH, "float32", TRAINER))
    checksums = TrainerRanks(TRAINER.world).send(ticket, cut_shards(ARCH, TRAINER, sent.tensors))
    with pytest.raises(ControllerError, match=r"canary refuses version 0 .*weight_update\.canary_bound=0\.0001"):
        controller.finish_update(update_check(0, checksums, held.probes()))
    with pytest.raises(ControllerError, match="no server"):
        controller.rollout(RolloutRequest(step=0))


@pytest.mark.parametrize(
    ("change", "dtype", "sentence"),
    [
        ({"num_hidden_layers": 3}, "float32", r"brings no weights for model\.layers\.3"),
        ({"num_hidden_layers": 5}, "float32", r"model\.layers\.4\.\S+ would come .*and this server has none"),
        ({"moe_intermediate_size": 32}, "float32", r"w13_weight would come as .*must run the same model"),
        ({}, "bfloat16", r"would come as torch\.bfloat16 .*this server has torch\.float32"),
    ],
)
def test_another_model_is_refused_by_name_and_holds_nobody_up(
    start_controller, oracles, change: dict[str, int], dtype: str, sentence: str
) -> None:
    _, controller = start_controller()
    arch = ARCH.model_copy(update=change)
    ticket = controller.begin_update(update_request(0, arch, dtype, Layout(1)))
    tensors = {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, shape in hf_shapes(arch).items()}
    # Whether the trainer sees it depends on how much is still to be sent when the server leaves.
    with suppress(TransferError):
        TrainerRanks(1).send(ticket, cut_shards(arch, Layout(1), tensors))
    with pytest.raises(ControllerError, match=rf"no server is left: .* did not receive the weights: .*{sentence}"):
        controller.finish_update(update_check(0, [0], oracles[0].probes()))


def test_a_broken_update_can_be_repeated(start_controller, oracles) -> None:
    """A trainer rank fails in the middle; a second, complete update leaves nothing of the first behind."""
    controller, client = start_controller()
    wrong, right = oracles
    ranks = TrainerRanks(TRAINER.world)
    ticket = client.begin_update(update_request(0, ARCH, "float32", TRAINER))
    shards = cut_shards(ARCH, TRAINER, wrong.tensors)
    del shards[2]["decoder.layers.3.self_attention.linear_proj.weight"]
    with pytest.raises(TransferError, match=r"the trainer has no parameter decoder\.layers\.3"):
        ranks.send(ticket, shards)
    report = update(client, 0, right, ranks)
    assert report.largest < 1e-4
    batch = client.rollout(RolloutRequest(step=0))
    assert differences(right, controller.store, batch.samples).max() < 1e-4
