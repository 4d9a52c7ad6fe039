"""From references to training rows, with what was dropped and why; and the cut into mini-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np

from gspo_megatron.types import Sample, SampleRef


class SampleReader(Protocol):
    """The part of the sample store that training needs."""

    def read(self, ref: SampleRef) -> tuple[np.ndarray, int, np.ndarray]:
        """Token ids int32 [length], index of the first answer token, sampler log-probs float32 [answer_length]."""
        ...

    def read_routes(self, ref: SampleRef) -> np.ndarray | None:
        """The sampler's experts [rows, layers, k] of the first tokens; None = none reported."""
        ...


@dataclass(frozen=True, slots=True)
class Selection:
    """The samples to train on, in prompt order."""

    refs: tuple[SampleRef, ...]
    """[N] kept references."""
    dropped: dict[str, int]
    """Samples left out, by reason: `{"aborted": 2}`; empty = none."""


def select(refs: Sequence[SampleRef]) -> Selection:
    """Leave out what cannot be trained on: responses that were aborted, that the teacher failed to score, or that have
    no trained token.

    Reads metadata only, so every rank decides the same without opening a file. Responses with zero advantage stay:
    they count in the denominators.

    Args:
        refs: [N], the groups one after the other.
    """
    reasons = [_reason_to_drop(ref) for ref in refs]
    kept = tuple(ref for ref, reason in zip(refs, reasons, strict=True) if reason is None)
    return Selection(kept, dict(Counter(reason for reason in reasons if reason is not None)))


def build_samples(refs: Sequence[SampleRef], store: SampleReader, with_routes: bool = False) -> list[Sample]:
    """Read the rows of selected references.

    Args:
        refs: [N] or any part of it: a data-parallel rank reads only its own.
        store: Where the rows lie.
        with_routes: Read the sampler's experts too.

    Raises:
        ValueError: A file contradicts its reference; the message names it.
    """
    return [_build(ref, store, with_routes) for ref in refs]


def split[Item: SampleRef | Sample](items: Sequence[Item], updates: int) -> list[list[Item]]:
    """Cut a rollout batch into mini-batches of whole groups, in the order in which the prompts come.

    Args:
        items: The groups one after the other; groups may differ in size.
        updates: Mini-batches. Where it does not divide the groups (some were dropped whole), the first get one more.
    """
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(_prompt_index(item), []).append(item)
    if len(groups) < updates:
        raise ValueError(f"{len(groups)} groups are left for {updates} updates; each update needs at least one group")
    ordered = list(groups.values())
    sizes = [len(ordered) // updates + (index < len(ordered) % updates) for index in range(updates)]
    cuts = accumulate(sizes, initial=0)
    return [[item for group in ordered[start:end] for item in group] for start, end in pairwise(cuts)]


def _reason_to_drop(ref: SampleRef) -> str | None:
    if ref.stop_reason == "abort":
        return "aborted"
    if ref.teacher_fault:
        return "no-teacher"
    return "empty-answer" if ref.trained_length == 0 else None


def _build(ref: SampleRef, store: SampleReader, with_routes: bool) -> Sample:
    token_ids, start, logprobs = store.read(ref)
    found = (start, len(token_ids) - start, len(logprobs))
    wanted = (ref.prompt_length, ref.answer_length, ref.answer_length)
    if found != wanted:
        raise ValueError(
            f"{ref.path} holds prompt, answer and log-probs of {found} tokens, its reference says {wanted}"
        )
    if not np.isfinite(logprobs).all():
        raise ValueError(
            f"{ref.path} holds a log-prob that is not finite; the sampler reported it for a token it sampled"
        )
    loss_mask = np.arange(len(token_ids)) >= start
    rollout_logprobs = np.zeros(len(token_ids), dtype=np.float32)
    rollout_logprobs[start:] = logprobs
    for span in ref.masked:
        loss_mask[start + span.start : start + span.end] = False
    rollout_logprobs[~loss_mask] = 0.0
    routes = pad_routes(store.read_routes(ref), len(token_ids)) if with_routes else None
    return Sample(np.asarray(token_ids, dtype=np.int32), loss_mask, rollout_logprobs, ref, routes)


def pad_routes(rows: np.ndarray | None, length: int) -> np.ndarray | None:
    """[length, layers, k] int16 of the recorded [rows, layers, k]; -1 where there is no row."""
    if rows is None:
        return None
    routes = np.full((length, *rows.shape[1:]), -1, np.int16)
    routes[: len(rows)] = rows
    return routes


def _prompt_index(item: SampleRef | Sample) -> int:
    return item.prompt_index if isinstance(item, SampleRef) else item.ref.prompt_index
