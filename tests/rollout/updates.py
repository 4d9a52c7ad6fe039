"""The two requests of a weight update, short to write."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.update_messages import Probe, UpdateCheck, UpdateRequest, WeightTerms


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
