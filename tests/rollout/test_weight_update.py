"""Live weight updates: right weights serve and equal Hugging Face, wrong ones never serve."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch

from gspo_megatron.data.store import SampleStore
from gspo_megatron.rollout.link import ControllerError, ControllerLink
from gspo_megatron.rollout.transfer import TransferError, WeightSender, tensor_checksum
from gspo_megatron.types import SampleRef
from tests.rollout.tiny import Oracle

CPU = torch.device("cpu")


def update(link: ControllerLink, version: int, oracle: Oracle, sender: WeightSender | None = None) -> dict:
    ticket = link.begin_update(version, oracle.manifest)
    checksum = (sender or WeightSender(CPU)).send(ticket, oracle.manifest, oracle.tensors.items())
    return link.finish_update(version, checksum, oracle.probes())


def differences(oracle: Oracle, store: SampleStore, refs: list[SampleRef]) -> np.ndarray:
    """|sampler's log-prob - Hugging Face's| of every answer token."""
    found = []
    for ref in refs:
        token_ids, answer_start, logprobs = store.read(ref)
        found.append(np.abs(oracle.logprobs(token_ids.tolist())[answer_start - 1 :] - logprobs))
    return np.concatenate(found)


def test_two_updates_with_different_weights(start_controller, oracles) -> None:
    controller, link = start_controller()
    sender = WeightSender(CPU)
    with pytest.raises(ControllerError, match="no server has weights"):
        link.rollout(0)
    for version, oracle in enumerate(oracles):
        report = update(link, version, oracle, sender)
        assert report["largest"] < 1e-4 and report["mean"] < 1e-5
        batch = link.rollout(version)
        found = differences(oracle, controller.store, batch["samples"])
        assert len(found) == batch["tokens"]
        assert found.max() < 1e-4 and found.mean() < 1e-5
        other = differences(oracles[1 - version], controller.store, batch["samples"])
        assert other.mean() > 0.1, "both models give the same log-probs: the test cannot tell them apart"
        assert all([segment.version for segment in ref.segments] == [version] for ref in batch["samples"])
    with pytest.raises(ControllerError, match="versions only grow"):
        link.begin_update(1, oracles[0].manifest)


def test_one_changed_tensor_is_refused_by_the_checksum(start_controller, oracles) -> None:
    _, link = start_controller()
    oracle = oracles[0]
    ticket = link.begin_update(0, oracle.manifest)
    changed = {name: value.clone() for name, value in oracle.tensors.items()}
    changed["model.layers.2.mlp.experts.5.up_proj.weight"][3, 4] += 1e-3
    WeightSender(CPU).send(ticket, oracle.manifest, changed.items())
    expected = sum(tensor_checksum(name, value) for name, value in oracle.tensors.items()) % 2**64
    with pytest.raises(ControllerError, match=r"no server is left: .* received weights with checksum"):
        link.finish_update(0, expected, oracle.probes())
    with pytest.raises(ControllerError, match="no server"):
        link.rollout(0)


def test_weights_that_are_not_the_trainers_are_refused_by_the_canary(start_controller, oracles) -> None:
    """The transfer is faultless, but the trainer computes with other weights than it sent."""
    _, link = start_controller()
    sent, held = oracles
    ticket = link.begin_update(0, sent.manifest)
    checksum = WeightSender(CPU).send(ticket, sent.manifest, sent.tensors.items())
    with pytest.raises(ControllerError, match=r"canary refuses version 0 .*weight_update\.canary_bound=0\.0001"):
        link.finish_update(0, checksum, held.probes())
    with pytest.raises(ControllerError, match="no server"):
        link.rollout(0)


def test_a_manifest_without_a_parameter_is_refused(start_controller, oracles) -> None:
    _, link = start_controller()
    oracle = oracles[0]
    missing = "model.layers.1.self_attn.q_norm.weight"
    manifest = [meta for meta in oracle.manifest if meta.name != missing]
    ticket = link.begin_update(0, manifest)
    tensors = ((name, value) for name, value in oracle.tensors.items() if name != missing)
    checksum = WeightSender(CPU).send(ticket, manifest, tensors)
    with pytest.raises(ControllerError, match=missing):
        link.finish_update(0, checksum, oracle.probes())


def test_a_server_that_fails_while_it_receives_holds_nobody_up(start_controller, oracles) -> None:
    _, link = start_controller()
    oracle = oracles[0]
    manifest = [replace(oracle.manifest[0], name="model.layers.99.mlp.gate.weight"), *oracle.manifest[1:]]
    tensors = zip([meta.name for meta in manifest], oracle.tensors.values(), strict=True)
    started = time.monotonic()
    ticket = link.begin_update(0, manifest)
    # Whether the trainer sees it depends on how much is still to be sent when the server leaves.
    with suppress(TransferError):
        WeightSender(CPU).send(ticket, manifest, tensors)
    with pytest.raises(ControllerError, match=r"no server is left: .* answered /update_weights with 500"):
        link.finish_update(0, 0, oracle.probes())
    assert time.monotonic() - started < ticket["timeout"] / 2


def test_a_broken_update_can_be_repeated(start_controller, oracles) -> None:
    """The trainer fails in the middle; a second, complete update leaves nothing of the first behind."""
    controller, link = start_controller()
    wrong, right = oracles
    sender = WeightSender(CPU)
    ticket = link.begin_update(0, wrong.manifest)
    half = list(wrong.tensors.items())[: len(wrong.tensors) * 2 // 3]
    with pytest.raises(TransferError, match="the weights end before tensor"):
        sender.send(ticket, wrong.manifest, half)
    report = update(link, 0, right, sender)
    assert report["largest"] < 1e-4
    batch = link.rollout(0)
    assert differences(right, controller.store, batch["samples"]).max() < 1e-4
