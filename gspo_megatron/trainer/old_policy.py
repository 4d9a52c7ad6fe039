"""The pass of the old policy over a mini-batch: log-probs and routes before any update, as far as they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.config.schema import Recipe
from gspo_megatron.objective.bounded import bounded_expm1
from gspo_megatron.policy.instruments import RouterInstruments
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.policy import Policy, Scored
from gspo_megatron.policy.replay import Routes

SAMPLED_MISMATCH = "mismatch_sampled/"
"""Begins the names of the metrics of one micro-batch a rank and step, scored with the sampler's routes and without."""


@dataclass(frozen=True, slots=True)
class OldScores:
    """One entry a micro-batch."""

    logprobs: Sequence[Scored | None]
    """None off the last stage, and where they were not scored."""
    routes: Sequence[Routes | None]
    """Those of this pass; where there was none those of the sampler, if they are replayed."""
    is_routed: Sequence[bool]
    """Whether the routes are of this pass."""


class OldPolicy:
    """Scores mini-batches under the weights at the start of a step, and measures what replay does for it."""

    def __init__(self, recipe: Recipe, policy: Policy, routers: RouterInstruments) -> None:
        self.recipe, self.policy, self.routers = recipe, policy, routers
        self.replays = recipe.objective.replay == "sampler"
        self._start()

    def _start(self) -> None:
        # With the sampler's routes and without: tokens, |trainer - sampler|, k3; and the largest difference.
        self._sums = torch.zeros(2, 3, dtype=torch.float64, device=self.policy.device)
        self._largest = torch.zeros(2, dtype=torch.float64, device=self.policy.device)

    def score(self, batches: Sequence[MicroBatch], is_first: bool) -> OldScores:
        """Score a mini-batch.

        The first one is trained on before any update, so its training pass gives the same. One micro-batch of it is
        scored nevertheless: it proves that the two passes agree.
        """
        reported = self._reported(batches)
        if not self.recipe.scores_old_policy:
            return OldScores([None] * len(batches), reported, [False] * len(batches))
        scored = batches[:1] if is_first and self.recipe.skips_zero_gradients else batches
        given = [entry for entry in reported[: len(scored)] if entry is not None]
        # Scored on the very micro-batches that are trained on, so that the first ratio is exactly 1.
        found = self.policy.score(scored, records=True, routes=given or None)
        # Where the sampler reported no choice for a token, the router's own choice is replayed.
        routes = self.policy.routing.recorded(len(scored))
        if given:
            self.routers.add_disagreement(scored, range(len(scored)))
        if len(scored) == len(batches):
            self.routers.add_load(batches, routes)
        if self.replays and is_first:
            self._compare(batches[:1], found)
        later = len(batches) - len(scored)
        return OldScores(
            [*(found if self.policy.is_last_stage else [None] * len(scored)), *[None] * later],
            [*routes, *reported[len(scored) :]],
            [*[True] * len(scored), *[False] * later],
        )

    def _reported(self, batches: Sequence[MicroBatch]) -> list[Routes | None]:
        """The sampler's routes of each micro-batch, where they are to be replayed."""
        if not self.replays:
            return [None] * len(batches)
        return [*self.policy.routing.reported(batches, self.recipe.arch.num_experts_per_tok)]

    def _compare(self, batches: Sequence[MicroBatch], with_routes: Sequence[Scored]) -> None:
        """Score once more with the trainer's own choices."""
        free = self.policy.score(batches)
        if not free or self.policy.at.tensor:
            return  # the tensor-parallel ranks of a stage compute the same
        for place, scored in enumerate((with_routes[0], free[0])):
            mask = batches[0].loss_mask
            shift = (scored.logprobs - batches[0].rollout_logprobs).double()[mask]
            parts = (mask.sum(), shift.abs().sum(), (bounded_expm1(shift) - shift).sum())
            self._sums[place] += torch.stack([part.double() for part in parts])
            if len(shift):
                self._largest[place] = torch.maximum(self._largest[place], shift.abs().max())

    def reduce(self) -> dict[str, float]:
        """The step's metrics, the same on every rank: see gspo_megatron/README.md. None without replay."""
        if not self.replays:
            return {}
        dist.all_reduce(self._sums)
        dist.all_reduce(self._largest, dist.ReduceOp.MAX)
        found: dict[str, float] = {}
        for name, sums, largest in zip(("replay", "free"), self._sums, self._largest, strict=True):
            found |= _describe(f"{SAMPLED_MISMATCH}{name}_", sums, largest)
        self._start()
        return found


def _describe(prefix: str, sums: Tensor, largest: Tensor) -> dict[str, float]:
    tokens, distance, k3 = sums.tolist()
    if not tokens:
        return {}
    return {f"{prefix}mean": distance / tokens, f"{prefix}k3": k3 / tokens, f"{prefix}largest": float(largest)}
