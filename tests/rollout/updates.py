"""Weight updates of real servers: their requests, and how far log-probs are from the oracle's afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.data.store import SampleStore
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.controller_client import ControllerClient
from gspo_megatron.transport.update_messages import Probe, UpdateCheck, UpdateReport, UpdateRequest, WeightTerms
from gspo_megatron.transport.weights.ipc import device_name
from gspo_megatron.types import SampleRef
from tests.rollout.tiny import ARCH, Oracle
from tests.shards import CPU, TrainerRanks, cut_shards


def update_request(
    version: int, architecture: Architecture, dtype: str, trainer: Layout, devices: Sequence[str] = ()
) -> UpdateRequest:
    terms = WeightTerms(architecture=architecture, dtype=dtype, trainer=trainer)
    return UpdateRequest(version=version, terms=terms, devices=tuple(devices))


def update_check(
    version: int, checksums: Sequence[int], probes: Sequence[tuple[list[int], list[float]]]
) -> UpdateCheck:
    scored = tuple(Probe(token_ids=tuple(ids), logprobs=tuple(logprobs)) for ids, logprobs in probes)
    return UpdateCheck(version=version, checksums=tuple(checksums), probes=scored)


TRAINERS = [
    Layout(4, tensor=2, pipeline=2, expert=2),
    Layout(4, context=2, expert=4),
    Layout(8, tensor=4, pipeline=2, virtual=2, expert=2, expert_tensor=2),
]
(TRAINER, *_) = TRAINERS


def update(
    controller: ControllerClient,
    version: int,
    oracle: Oracle,
    ranks: TrainerRanks | None = None,
    trainer: Layout = TRAINER,
    shares: bool = False,
) -> UpdateReport:
    """One update; by hand-over if servers share the trainer's device."""
    ticket = controller.begin_update(
        update_request(version, ARCH, "float32", trainer, [device_name(CPU)] * trainer.world * shares)
    )
    checksums = (ranks or TrainerRanks(trainer.world)).send(ticket, cut_shards(ARCH, trainer, oracle.tensors))
    return controller.finish_update(update_check(version, checksums, oracle.probes()))


def differences(oracle: Oracle, store: SampleStore, refs: Sequence[SampleRef]) -> np.ndarray:
    """|sampler's log-prob - Hugging Face's| of every answer token."""
    found = []
    for ref in refs:
        token_ids, answer_start, logprobs = store.read(ref)
        found.append(np.abs(oracle.logprobs(token_ids.tolist())[answer_start - 1 :] - logprobs))
    return np.concatenate(found)
