"""From stored samples to this rank's micro-batches: packed so that ranks wait little, then cut over their ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.packing import PackedBatch, collate, pack
from gspo_megatron.data.samples import build_samples
from gspo_megatron.data.store import SampleStore
from gspo_megatron.objective import BatchTotals, kl_in_reward
from gspo_megatron.plan.estimate.flops import forward_flops
from gspo_megatron.policy.microbatch import MicroBatch, pad_multiple
from gspo_megatron.policy.policy import Policy, Scored
from gspo_megatron.policy.replay import Routes
from gspo_megatron.types import Sample, SampleRef


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """What one optimizer step trains on."""

    refs: list[list[SampleRef]]
    """Whose sequences each of this rank's micro-batches holds, in order; none in one that only fills a slot."""
    micro_batches: list[MicroBatch]
    """This rank's, as many as every other rank's."""
    totals: BatchTotals
    """Denominators over all ranks."""
    old: list[Scored]
    """Log-probs under the weights at the start of the rollout batch, one entry a micro-batch; last stage only."""
    routes: list[Routes]
    """Experts chosen under those weights, one entry a micro-batch; those of a dense model are empty."""
    reference: list[Scored] | None
    """Log-probs under the reference policy, as `old`; None without a divergence from it."""

    def with_advantages(self, value: dict[SampleRef, float]) -> MiniBatch:
        """The same with the advantage of every sequence put in."""
        weighed = []
        for refs, batch in zip(self.refs, self.micro_batches, strict=True):
            values = torch.tensor([value[ref] for ref in refs] or [0.0], dtype=batch.advantages.dtype)
            weighed.append(replace(batch, advantages=values.to(batch.advantages.device)))
        return replace(self, micro_batches=weighed)


class Batcher:
    """Packs for one trainer rank."""

    def __init__(self, recipe: Recipe, policy: Policy, store: SampleStore) -> None:
        self.recipe, self.policy, self.store = recipe, policy, store

    def place_refs(self, refs: Sequence[SampleRef]) -> tuple[list[list[SampleRef]], list[MicroBatch]]:
        """Read, pack and place this rank's share of stored samples; advantages are put in later."""
        mine = [[refs[i] for i in members] for members in self._pack([r.prompt_length + r.answer_length for r in refs])]
        reported = self.recipe.objective.replay == "sampler"
        samples = [build_samples(members, [0.0] * len(members), self.store, reported) for members in mine]
        return mine, self.policy.place([self.collate(members) for members in samples])

    def place_samples(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """Pack samples that are at hand (fine-tuning) and place this rank's share."""
        mine = self._pack([len(sample.token_ids) for sample in samples])
        return self.policy.place([self.collate([samples[i] for i in members]) for members in mine])

    def collate(self, samples: Sequence[Sample]) -> PackedBatch:
        """One packed row."""
        return collate(samples, pad_multiple(self.policy.layout))

    def probes(self) -> list[Sample]:
        """Twice `weight_update.canary_prompts` sequences of random tokens, the same at every call and on every rank."""
        section, arch = self.recipe.weight_update, self.recipe.model.architecture
        assert arch is not None
        generator = np.random.default_rng(self.recipe.run.seed)
        rows = [
            generator.integers(0, arch.vocab_size, section.canary_tokens) for _ in range(2 * section.canary_prompts)
        ]
        return [_only_scored(row.astype(np.int32)) for row in rows]

    def score_probes(self) -> list[tuple[list[int], list[float]]]:
        """Ids of the canary's probes and the policy's log-probs of all but the first id of each.

        Of those that there are the half that is farthest from a router tie.
        """
        scored = []
        for sample in self.probes():
            logprobs, margin = self.policy.probe(self.collate([sample]))
            scored.append((margin, (sample.token_ids.tolist(), logprobs[: len(sample.token_ids) - 1].tolist())))
        scored.sort(key=lambda entry: -entry[0])
        return [probe for _, probe in scored[: self.recipe.weight_update.canary_prompts]]

    def _pack(self, lengths: Sequence[int]) -> list[list[int]]:
        """Members of each of this data-parallel rank's micro-batches."""
        layout, multiple = self.policy.layout, pad_multiple(self.policy.layout)
        padded = [-(-length // multiple) * multiple for length in lengths]
        slots = pack(
            padded,
            cost=self._cost,
            num_ranks=layout.data,
            max_tokens=self.recipe.trainer.micro_batch_tokens,
            ranks_per_expert_group=max(1, layout.expert * layout.expert_tensor // (layout.tensor * layout.context)),
            # The interleaved schedule takes micro-batches in groups of PP.
            slot_multiple=layout.pipeline if layout.virtual > 1 else 1,
            bubble_slots=(layout.pipeline - 1) / layout.virtual,
        )
        return [slot[self.policy.at.data] for slot in slots]

    def _cost(self, length: int) -> float:
        """Forward FLOPs of a sequence: linear in its tokens, and attention's square of them."""
        arch = self.recipe.model.architecture
        assert arch is not None
        return length * forward_flops(arch, length)


def _only_scored(token_ids: np.ndarray) -> Sample:
    """A sequence that nothing is trained on; its tokens after the first count as an answer."""
    ref = SampleRef("", 0, 0, 1, len(token_ids) - 1, 0.0, "stop", ())
    mask = np.arange(len(token_ids)) > 0
    return Sample(token_ids, mask, np.zeros(len(token_ids), np.float32), 0.0, ref)


def divergence(
    spec: ObjectiveSpec, minibatches: Sequence[MiniBatch], sum_over_context: Callable[[Tensor], Tensor]
) -> dict[tuple[int, int], float]:
    """What each answer, by (prompt, sample), is charged for its divergence from the reference policy, on every rank."""
    mine: dict[tuple[int, int], float] = {}
    for minibatch in minibatches:
        assert minibatch.reference is not None
        # Off the last stage there are no log-probs, and nothing to charge.
        parts = zip(minibatch.refs, minibatch.micro_batches, minibatch.old, minibatch.reference, strict=False)
        for refs, batch, old, reference in parts:
            charges = kl_in_reward(
                spec, old.logprobs, reference.logprobs, batch.loss_mask, batch.cu_seqlens, sum_over_context
            )
            for ref, charge in zip(refs, charges.tolist(), strict=False):
                mine[ref.prompt_index, ref.sample_index] = charge
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return {sample: charge for part in gathered for sample, charge in part.items()}
