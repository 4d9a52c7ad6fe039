"""From stored samples to this rank's micro-batches: packed to balance the ranks, then cut over context parallelism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.balance_search import CLOSE_ENOUGH
from gspo_megatron.data.context_packing import SharedPack, pack_at, pack_shared
from gspo_megatron.data.packing import PackedBatch, collate, pack
from gspo_megatron.data.samples import build_samples
from gspo_megatron.data.store import SampleStore
from gspo_megatron.objective import BatchTotals, kl_in_reward
from gspo_megatron.parallel import round_up
from gspo_megatron.plan.estimate.flops import forward_flops
from gspo_megatron.plan.estimate.sequence_time import SequenceTime
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.policy import Policy, Scored
from gspo_megatron.policy.replay import Routes
from gspo_megatron.trainer.token_staleness import token_staleness
from gspo_megatron.transport.update_messages import Probe
from gspo_megatron.types import Sample, SampleRef

SEARCH_SECONDS = 0.016
"""Processor seconds of the search for better packs of 512 sequences (data/NOTES.md). One that can gain less of the
planned seconds of the batch is not made: on the tiny model it took 7 % of a step."""


@dataclass(frozen=True, slots=True)
class ScoredMicroBatch:
    """One micro-batch of this rank, and what the weights before the first update say about its tokens."""

    refs: Sequence[SampleRef]
    """[S] its sequences in order; empty in a micro-batch that only fills a slot."""
    batch: MicroBatch
    """What the forward pass reads."""
    routes: Routes | None
    """Experts that the old policy chose; empty for a dense model. Where no pass of it came before, those of the sampler
    if they are replayed, else None."""
    is_routed: bool
    """Whether a pass of the old policy chose `routes`; otherwise the training pass records what it chooses."""
    old: Scored | None
    """Log-probs under the old policy: the weights at the start of the rollout batch. None off the last stage and where
    they were not scored: see `MiniBatch.old_logprobs`."""
    reference: Scored | None
    """Log-probs under the reference policy. None off the last stage, and without a divergence from it."""

    def with_advantages(self, advantages: Mapping[SampleRef, float]) -> TrainingMicroBatch:
        """This micro-batch, ready for its update."""
        values = torch.tensor([advantages[ref] for ref in self.refs] or [0.0], dtype=torch.float64)
        return self.ready(values.to(self.batch.loss_mask.device))

    def ready(self, advantages: Tensor, returns: Tensor | None = None) -> TrainingMicroBatch:
        """This micro-batch with what `TrainingMicroBatch` adds."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return TrainingMicroBatch(**known, advantages=advantages, returns=returns)


@dataclass(frozen=True, slots=True)
class TrainingMicroBatch(ScoredMicroBatch):
    """A scored micro-batch with the advantages of its sequences."""

    advantages: Tensor
    """[S] float64; one 0 in a micro-batch that only fills a slot. [T_local] where there is one a token."""
    returns: Tensor | None = None
    """[T_local] float64: what the critic learns."""


@dataclass(frozen=True, slots=True)
class MiniBatch[Part: ScoredMicroBatch]:
    """What one optimizer step trains on."""

    micro_batches: Sequence[Part]
    """This rank's, as many as every other rank's."""
    totals: BatchTotals
    """Denominators over all ranks."""
    left_out: BatchTotals
    """The part of `totals` that is in no micro-batch of any rank, because its gradient is 0."""
    is_first: bool
    """Whether it is trained on before any update of the weights that gave the old log-probs."""
    version: int = 0
    """Of those weights."""

    def with_advantages(self, advantages: Mapping[SampleRef, float]) -> MiniBatch[TrainingMicroBatch]:
        """This mini-batch, ready for its update."""
        return self.ready([micro.with_advantages(advantages) for micro in self.micro_batches])

    def ready(self, micro_batches: Sequence[TrainingMicroBatch]) -> MiniBatch[TrainingMicroBatch]:
        """This mini-batch with its micro-batches ready for the update."""
        return MiniBatch(micro_batches, self.totals, self.left_out, self.is_first, self.version)

    def old_logprobs(self, index: int, now: Tensor) -> Tensor | None:
        """[T_local] old log-probs of a micro-batch.

        Args:
            index: of the micro-batch.
            now: [T_local] its log-probs in the training pass, which are the old ones before any update.

        Returns:
            None where no pass computed them, because only metrics would read them.
        """
        old = self.micro_batches[index].old
        if old is None:
            return now if self.is_first else None
        return old.logprobs

    def staleness(self, index: int, spec: ObjectiveSpec) -> Tensor | None:
        """[T_local] versions between each token of a micro-batch and the old weights; None where nothing reads them."""
        if spec.ratio_reference != "interpolated":
            return None
        micro = self.micro_batches[index]
        return token_staleness(micro.refs, micro.batch, self.version)


class Batcher:
    """Packs for one trainer rank."""

    def __init__(self, recipe: Recipe, policy: Policy, store: SampleStore) -> None:
        self.recipe, self.policy, self.store = recipe, policy, store

    def place_refs(self, refs: Sequence[SampleRef]) -> tuple[list[list[SampleRef]], list[MicroBatch]]:
        """Read, pack and place this rank's share of stored samples.

        Returns:
            For each micro-batch its references in order, and the micro-batch.
        """
        packs = self._pack([r.prompt_length + r.answer_length for r in refs])
        mine = [[refs[i] for i in pack.members] for pack in packs]
        reported = self.recipe.objective.replay == "sampler"
        samples = [build_samples(members, self.store, reported) for members in mine]
        return mine, self._place(packs, samples)

    def place_samples(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """Pack samples that are in memory (fine-tuning) and place this rank's share."""
        packs = self._pack([len(sample.token_ids) for sample in samples])
        return self._place(packs, [[samples[i] for i in pack.members] for pack in packs])

    def collate(self, samples: Sequence[Sample]) -> PackedBatch:
        """One packed row that all context-parallel ranks share."""
        return collate(samples, self.policy.layout.pad_multiple)

    def _place(self, packs: Sequence[SharedPack], samples: Sequence[Sequence[Sample]]) -> list[MicroBatch]:
        padding = self.policy.layout.padding_of
        rows = [collate(part, padding(pack.ranks), pack.ranks) for pack, part in zip(packs, samples, strict=True)]
        return self.policy.place(rows)

    def probes(self) -> list[Sample]:
        """Twice `weight_update.canary_prompts` sequences of random tokens, the same at every call and on every rank."""
        section, arch = self.recipe.weight_update, self.recipe.arch
        generator = np.random.default_rng(self.recipe.run.seed)
        rows = [
            generator.integers(0, arch.vocab_size, section.canary_tokens) for _ in range(2 * section.canary_prompts)
        ]
        return [_only_scored(row.astype(np.int32)) for row in rows]

    def score_probes(self) -> list[Probe]:
        """The canary's probes with the policy's log-probs.

        Of all probes the half that is farthest from a router tie.
        """
        samples = self.probes()
        pack = self.collate(samples)
        logprobs, margins = (found.tolist() for found in self.policy.probe(pack))
        scored = []
        for sample, start, margin in zip(samples, pack.cu_seqlens.tolist()[:-1], margins, strict=True):
            ids = tuple(sample.token_ids.tolist())
            scored.append((margin, Probe(token_ids=ids, logprobs=tuple(logprobs[start : start + len(ids) - 1]))))
        scored.sort(key=lambda entry: -entry[0])
        return [probe for _, probe in scored[: self.recipe.weight_update.canary_prompts]]

    @cached_property
    def _time(self) -> SequenceTime:
        return SequenceTime(self.recipe, self.policy.layout)

    def _pack(self, lengths: Sequence[int]) -> list[SharedPack]:
        """This rank's pack in each micro-batch; members are indices into `lengths`."""
        layout, most = self.policy.layout, self.recipe.trainer.micro_batch_tokens
        inner = layout.tensor * layout.context
        waiting = max(1, layout.expert * layout.expert_tensor // inner)
        if layout.dynamic:
            shared = pack_shared(lengths, self._time, layout, most, self._time.slot, waiting)
            return [pack_at(slot[self.policy.at.data], self.policy.at.context) for slot in shared]
        slots = pack(
            [round_up(length, layout.pad_multiple) for length in lengths],
            cost=self._cost,
            num_ranks=layout.data,
            max_tokens=most,
            ranks_per_expert_group=waiting,
            # The interleaved schedule takes micro-batches in groups of PP.
            slot_multiple=layout.pipeline if layout.virtual > 1 else 1,
            bubble_slots=(layout.pipeline - 1) / layout.virtual,
            close_enough=max(CLOSE_ENOUGH, SEARCH_SECONDS / self._time.batch(lengths, layout.data)) if lengths else 1.0,
        )
        return [SharedPack(layout.context, slot[self.policy.at.data]) for slot in slots]

    def _cost(self, length: int) -> float:
        """Forward FLOPs of a sequence: linear in its tokens, and attention's square of them."""
        return length * forward_flops(self.recipe.arch, length)


def _only_scored(token_ids: np.ndarray) -> Sample:
    """A sequence for scoring; its tokens after the first are marked as trained so that they are scored."""
    ref = SampleRef("", 0, 0, 1, len(token_ids) - 1, 0.0, "stop", ())
    mask = np.arange(len(token_ids)) > 0
    return Sample(token_ids, mask, np.zeros(len(token_ids), np.float32), ref)


def charge_divergence(
    spec: ObjectiveSpec, minibatches: Sequence[MiniBatch[ScoredMicroBatch]]
) -> dict[tuple[int, int], float]:
    """What the reward of each response is lowered by for its divergence from the reference policy, on every rank.

    Returns:
        By (prompt, sample).
    """
    mine: dict[tuple[int, int], float] = {}
    for micro in (micro for minibatch in minibatches for micro in minibatch.micro_batches):
        if micro.old is None or micro.reference is None:
            continue  # off the last stage there are no log-probs, and nothing to charge
        batch, old, reference = micro.batch, micro.old.logprobs, micro.reference.logprobs
        charges = kl_in_reward(spec, old, reference, batch.loss_mask, batch.cu_seqlens, batch.share.sum)
        # The one sequence of a micro-batch that fills a slot has no reference.
        for ref, charge in zip(micro.refs, charges.tolist(), strict=False):
            mine[ref.prompt_index, ref.sample_index] = charge
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return {sample: charge for part in gathered for sample, charge in part.items()}
