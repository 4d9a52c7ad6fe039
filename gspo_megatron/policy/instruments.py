"""Metrics of the routers, computed from their choices alone, so that they exist without an auxiliary loss.

Every number is of trained tokens, summed over all ranks. L = layers of the model, E = experts, k = experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.objective.metrics import BUCKET_NAMES
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.policy import Policy
from gspo_megatron.policy.replay import ABSENT, Routes, from_stored

PREFIX = "experts/"


class RouterInstruments:
    """Collects over one step; `reduce` returns the step's metrics and resets. A dense model has none."""

    def __init__(self, policy: Policy) -> None:
        arch = policy.recipe.arch
        self.policy, self.num_layers, self.num_experts = policy, arch.num_hidden_layers, arch.num_experts
        self._probe: list[Routes] | None = None
        self._start()

    def _start(self) -> None:
        self._load = self._zeros(self.num_layers, max(1, self.num_experts))
        self._changes: list[Tensor] = []
        self._probe_changes = self._zeros(2, self.num_layers)
        self._disagreement = self._zeros(2, self.num_layers, len(BUCKET_NAMES))
        self._bytes = self._zeros(3)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.policy.device)

    def add_load(self, batches: Sequence[MicroBatch], routes: Sequence[Routes]) -> None:
        """Count the choices of the old weights."""
        for entry, counted in zip(routes, self.policy.routing.counted_rows(batches), strict=True):
            for layer, stored in zip(self.policy.routing.layers, entry.chosen, strict=True):
                chosen = from_stored(stored)
                once = counted[:, None].expand_as(chosen).double()
                self._load[layer].index_add_(0, chosen.flatten(), once.flatten())
        self._bytes[0] += sum(entry.num_bytes for entry in routes)
        if self.policy.at.tensor == self.policy.at.pipeline == 0:
            self._bytes[1] += sum(len(batch.token_ids) for batch in batches)

    def add_update(self, batches: Sequence[MicroBatch], routes: Sequence[Routes | None]) -> None:
        """Take from the training pass that just ended how far its choices are from those that it was given.

        Args:
            batches: what was trained on.
            routes: of the old weights, or of the sampler; None where there were none.
        """
        if not self.num_experts:
            return
        compared = [batch for batch, entry in zip(batches, routes, strict=True) if entry is not None]
        rows = sum(int(counted.sum()) for counted in self.policy.routing.counted_rows(compared))
        first = next((entry for entry in routes if entry is not None), None)
        changes = self._zeros(2, self.num_layers)
        if first is not None:
            changed = self.policy.routing.changes()
            for number, layer in enumerate(self.policy.routing.layers):
                changes[0, layer] = changed[number].sum()
                changes[1, layer] = rows * first.chosen[number].shape[1]
        self._changes.append(changes)

    def add_disagreement(self, batches: Sequence[MicroBatch], which: Collection[int]) -> None:
        """Take from the pass of the old weights that just ended how far its own choices were from the sampler's.

        Args:
            batches: of the pass.
            which: micro-batches that count: those that were given the sampler's choices.
        """
        routing = self.policy.routing
        for changed, layer in zip(routing.changes(which), routing.layers, strict=True):
            self._disagreement[0, layer] += changed
        for batch in (batches[index] for index in which):
            if batch.routes is None:
                continue
            reported = routing.of_this_rank(batch.routes) != ABSENT
            counted, bucket = routing.of_this_rank(batch.loss_mask), routing.of_this_rank(batch.length_buckets())
            for layer in routing.layers:
                found = (reported[:, layer] & counted[:, None]).sum(1).double()
                self._disagreement[1, layer].index_add_(0, bucket, found)
                self._bytes[2] += reported[:, layer].sum() * (1 if self.num_experts <= 256 else 2)

    def probe(self, batch: MicroBatch) -> None:
        """Route a fixed batch under the present weights and count what changed since the last time."""
        if not self.num_experts:
            return
        before = self._probe
        self.policy.score([batch], records=True)
        self._probe = self.policy.routing.recorded(1)
        if before is None:
            return
        (rows,) = self.policy.routing.counted_rows([batch])
        for number, layer in enumerate(self.policy.routing.layers):
            now, old = (from_stored(entry[0].chosen[number])[rows] for entry in (self._probe, before))
            moved = (now[:, :, None] != old[:, None, :]).all(2)
            self._probe_changes[0, layer] += moved.sum()
            self._probe_changes[1, layer] += moved.numel()

    def reduce(self) -> dict[str, float]:
        """The step's metrics, the same on every rank: see gspo_megatron/README.md."""
        if not self.num_experts:
            return {}
        parts = [self._load, self._probe_changes, self._disagreement, self._bytes, *self._changes]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        load, probe, disagreement, size, *changes = [
            piece.view(part.shape)
            for piece, part in zip(flat.cpu().split([part.numel() for part in parts]), parts, strict=True)
        ]
        found = _load_metrics(load)
        found |= _share("probe_changed", probe) | _share("sampler_disagreement", disagreement.sum(2))
        for name, (changed, choices) in zip(BUCKET_NAMES, disagreement.sum(1).T.tolist(), strict=True):
            if choices:
                found[f"{PREFIX}sampler_disagreement/{name}"] = changed / choices
        for index, (changed, choices) in enumerate(changes):
            if choices.any():
                found[f"{PREFIX}changed/minibatch_{index}"] = float(changed.sum() / choices.sum())
        found |= _share("changed", changes[-1]) if changes else {}
        found[f"{PREFIX}route_bytes_per_token"] = float(size[0] / size[1].clamp(min=1))
        found[f"{PREFIX}route_bytes"] = float(size[0])
        if size[2]:
            found[f"{PREFIX}sampler_route_bytes"] = float(size[2])
        found[f"{PREFIX}route_seconds"] = self.policy.routing.take_seconds()
        self._start()
        return found


def _load_metrics(load: Tensor) -> dict[str, float]:
    """[L, E] choices -> largest load over the mean one, and the entropy of the load over that of an even one."""
    share = load / load.sum(1, keepdim=True).clamp(min=1)
    ratio = share.amax(1) * load.shape[1]
    entropy = -torch.where(share > 0, share * share.log(), 0.0).sum(1) / math.log(max(2, load.shape[1]))
    found = {f"{PREFIX}load_max_over_mean": float(ratio.max()), f"{PREFIX}load_entropy": float(entropy.min())}
    for layer in range(len(load)):
        found[f"{PREFIX}load_max_over_mean/layer_{layer}"] = float(ratio[layer])
        found[f"{PREFIX}load_entropy/layer_{layer}"] = float(entropy[layer])
    return found


def _share(name: str, counts: Tensor) -> dict[str, float]:
    """[2, L] changed and all choices -> the share over all layers and of each."""
    if not float(counts[1].sum()):
        return {}
    found = {f"{PREFIX}{name}": float(counts[0].sum() / counts[1].sum())}
    return found | {
        f"{PREFIX}{name}/layer_{layer}": float(counts[0, layer] / counts[1, layer].clamp(min=1))
        for layer in range(counts.shape[1])
    }
