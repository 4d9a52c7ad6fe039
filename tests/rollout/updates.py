"""Weight updates of real servers, and how far their log-probs are from the oracle's."""

from __future__ import annotations

from typing import Any

import numpy as np

from gspo_megatron.data.store import SampleStore
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.controller_client import ControllerClient
from gspo_megatron.transport.weights.ipc import device_name
from gspo_megatron.types import SampleRef
from tests.rollout.tiny import ARCH, Oracle
from tests.shards import CPU, TrainerRanks, cut_shards

TRAINER = Layout(4, tensor=2, pipeline=2, expert=2)


def update(
    client: ControllerClient,
    version: int,
    oracle: Oracle,
    ranks: TrainerRanks | None = None,
    trainer: Layout = TRAINER,
    shares: bool = False,
) -> dict[str, Any]:
    """One update; by hand-over if servers share the trainer's device."""
    ticket = client.begin_update(version, ARCH, "float32", trainer, [device_name(CPU)] * trainer.world * shares)
    checksums = (ranks or TrainerRanks(trainer.world)).send(ticket, cut_shards(ARCH, trainer, oracle.tensors))
    return client.finish_update(version, checksums, oracle.probes())


def differences(oracle: Oracle, store: SampleStore, refs: list[SampleRef]) -> np.ndarray:
    """|sampler's log-prob - Hugging Face's| of every response token."""
    found = []
    for ref in refs:
        token_ids, answer_start, logprobs = store.read(ref)
        found.append(np.abs(oracle.logprobs(token_ids.tolist())[answer_start - 1 :] - logprobs))
    return np.concatenate(found)
