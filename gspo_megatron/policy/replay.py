"""Routing replay: record which experts every token chose, and choose them again under other weights.

A router asks its `router_replay` for the choice. megatron-core's own `RouterReplay` keeps one global list over all
models and virtual stages, hands the recomputation of a pipelined micro-batch the choice of the newest one, and lets its
queues grow for ever without recomputation. `RouterSeam` sits in the same place and knows, for each call, which
micro-batch it belongs to: a call within the forward pass of its chunk belongs to that micro-batch; any other call is a
recomputation in backward, and every schedule runs the backward passes of a chunk in the order of its forward passes.

It also chooses in descending order of score in every pass. Megatron sorts only while gradients are on, so the pass that
makes the old log-probs would add the chosen probabilities up in another order than the training pass.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from gspo_megatron.objective.metrics import BUCKET_NAMES
from gspo_megatron.policy.microbatch import MicroBatch

ABSENT = -1
"""Expert number of a row without a recorded choice (a prompt out of a prefix cache, a last token): route normally."""


@dataclass(frozen=True, slots=True)
class Routes:
    """The experts of one micro-batch in every router of this rank. L = its routers, k = experts a token."""

    chosen: tuple[Tensor, ...]
    """[L] of [T_rank, k], in stored form: the tokens that the router sees, T_local / TP under sequence parallelism."""

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return sum(part.nbytes for part in self.chosen)


def stored_type(num_experts: int) -> torch.dtype:
    """One byte a choice where it can hold every expert and `ABSENT`, else two."""
    return torch.uint8 if num_experts <= 255 else torch.int16


def to_stored(indices: Tensor, num_experts: int) -> Tensor:
    """Expert numbers, or `ABSENT`, in stored form."""
    return indices.to(stored_type(num_experts))


def from_stored(stored: Tensor) -> Tensor:
    """int64 expert numbers, or `ABSENT`."""
    indices = stored.long()
    return torch.where(indices == 255, ABSENT, indices) if stored.dtype is torch.uint8 else indices


class RouterSeam:
    """Chooses the experts of one router: its own choice, or a recorded one."""

    def __init__(self, layer: int, num_experts: int) -> None:
        self.layer, self.num_experts = layer, num_experts
        self.seconds = 0.0
        self.rest()

    def rest(self) -> None:
        """Between two runs of the schedule."""
        self.routes: Sequence[Tensor | None] | None = None
        self.replays = False
        self.counted: list[Tensor] | None = None
        self.buckets: list[Tensor] | None = None
        self.recorded: dict[int, Tensor] | None = None
        self.margins: list[Tensor] | None = None
        self.index: int | None = None
        self.again: deque[int] = deque()
        self.changed: dict[int, Tensor] = {}
        self.known: Tensor | None = None
        self.skipped = 0

    def get_replay_topk(self, scores: Tensor, topk: int, *_: Any) -> tuple[Tensor, Tensor]:
        """[T_rank, experts] scores -> values and indices [T_rank, topk]."""
        if self.known is not None:
            return scores.gather(1, self.known), self.known
        recomputes = self.index is None
        index = self._recomputed() if self.index is None else self.index
        chosen = torch.topk(scores.detach(), k=topk, dim=1, sorted=True).indices
        began = time.perf_counter()
        target = None if self.routes is None else self._target(index, len(scores), topk)
        if target is not None:
            if not recomputes:
                self._count_changes(index, chosen, target)
            if self.replays:
                chosen = torch.where(target[:, :1] == ABSENT, chosen, target)
        if not recomputes:
            self._observe(index, scores.detach(), chosen)
        self.seconds += time.perf_counter() - began
        return scores.gather(1, chosen), chosen

    def _recomputed(self) -> int:
        if not self.again:
            raise RuntimeError(f"the router of layer {self.layer} was asked outside of every forward pass")
        return self.again.popleft()

    def _target(self, index: int, rows: int, topk: int) -> Tensor | None:
        assert self.routes is not None
        stored = self.routes[index]
        if stored is None:
            return None
        if stored.shape != (rows, topk):
            raise ValueError(
                f"routes {list(stored.shape)} of micro-batch {index} do not fit the router of layer {self.layer}, "
                f"which sees [{rows}, {topk}]; replay the micro-batches that were recorded, in their order"
            )
        return from_stored(stored)

    def _count_changes(self, index: int, chosen: Tensor, target: Tensor) -> None:
        """Choices of counted rows that the recorded ones do not hold, by the length of their sequences."""
        assert self.counted is not None and self.buckets is not None
        moved = (chosen[:, :, None] != target[:, None, :]).all(2) & (target != ABSENT).any(1, keepdim=True)
        changed = (moved & self.counted[index][:, None]).sum(1)
        none = torch.zeros(len(BUCKET_NAMES), dtype=torch.float64, device=chosen.device)
        self.changed[index] = none.index_add(0, self.buckets[index], changed.double())

    def _observe(self, index: int, scores: Tensor, chosen: Tensor) -> None:
        if self.recorded is not None:
            self.recorded[index] = to_stored(chosen, self.num_experts)
        if self.margins is not None and len(scores) and chosen.shape[1] < scores.shape[1]:
            best = torch.topk(scores, k=chosen.shape[1] + 1, dim=1, sorted=True).values
            self.margins.append(best[:, -2] - best[:, -1])


class Routing:
    """The seams of all routers of this rank's chunks, and their mode during a run of the schedule."""

    def __init__(self, chunks: Sequence[torch.nn.Module], num_experts: int, place: int = 0, parts: int = 1) -> None:
        """Take the routers of the chunks.

        Args:
            chunks: the model chunks of this rank.
            num_experts: of the whole model; 0 = dense.
            place: this rank among the `parts` that a micro-batch's tokens are cut into by sequence parallelism.
            parts: tensor-parallel size.
        """
        self._place, self._parts = place, parts
        self._of_chunk = [
            [_install(module, num_experts) for module in chunk.modules() if isinstance(module, TopKRouter)]
            for chunk in chunks
        ]
        self.seams = [seam for seams in self._of_chunk for seam in seams]
        self.layers = [seam.layer for seam in self.seams]
        self._trains = False

    @contextlib.contextmanager
    def run(
        self,
        batches: Sequence[MicroBatch],
        *,
        trains: bool,
        routes: Sequence[Routes | None] | None = None,
        replays: bool = False,
        records: bool = False,
        margins: list[Tensor] | None = None,
    ) -> Iterator[None]:
        """Around one run of the schedule.

        Args:
            batches: the micro-batches of the run.
            trains: whether backward passes follow, in which routers may be asked again.
            routes: recorded routes, one a micro-batch; choices of trained tokens that differ are counted. None where a
                micro-batch has none.
            replays: choose them again.
            records: keep the choices; `recorded` gives them.
            margins: takes, for every call, [T_rank] gaps between the last chosen and the first rejected score.
        """
        self._trains = trains
        counted = self.counted_rows(batches)
        buckets = None if routes is None else [self.of_this_rank(batch.length_buckets()) for batch in batches]
        for number, seam in enumerate(self.seams):
            seam.rest()
            seam.routes = None if routes is None else [entry and entry.chosen[number] for entry in routes]
            seam.replays, seam.counted, seam.buckets, seam.margins = replays, counted, buckets, margins
            seam.recorded = {} if records else None
        yield
        for seam in self.seams:
            if seam.again and routes is not None and len(seam.again) + seam.skipped != len(routes):
                raise RuntimeError(
                    f"layer {seam.layer} recomputed {len(routes) - len(seam.again)} of {len(routes)} micro-batches; "
                    "its recorded routes went to the wrong ones"
                )
            seam.routes, seam.counted, seam.buckets, seam.margins = None, None, None, None
            seam.again.clear()

    @contextlib.contextmanager
    def forward(self, chunk: int, index: int) -> Iterator[None]:
        """Around the forward pass of one micro-batch through one chunk."""
        for seam in self._of_chunk[chunk]:
            seam.index = index
            if self._trains:
                seam.again.append(index)
        yield
        for seam in self._of_chunk[chunk]:
            seam.index = None

    def skip(self, chunk: int) -> None:
        """The next backward pass of a chunk is left out, and its recomputation."""
        for seam in self._of_chunk[chunk]:
            seam.again.popleft()
            seam.skipped += 1

    @contextlib.contextmanager
    def known(self, index: int, narrow: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Around a backward pass that recomputes rows of a recorded micro-batch: their choices are those recorded.

        Args:
            index: the micro-batch.
            narrow: picks the rows of this rank's routers.
        """
        for seam in self.seams:
            assert seam.recorded is not None
            seam.known = from_stored(narrow(seam.recorded[index]))
        yield
        for seam in self.seams:
            seam.known = None

    def counted_rows(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """[T_rank] bool of each micro-batch: rows of this rank's routers that predict a trained token."""
        return [self.of_this_rank(batch.loss_mask) for batch in batches]

    def of_this_rank(self, local: Tensor) -> Tensor:
        """[T_rank, ...] of [T_local, ...]: the rows that this rank's routers see under sequence parallelism."""
        return local.chunk(self._parts)[self._place]

    def reported(self, batches: Sequence[MicroBatch], topk: int) -> list[Routes]:
        """Routes that the sampler reported, for this rank's rows; all absent where it reported none."""
        found = []
        for batch in batches:
            whole = batch.routes
            if whole is None:
                whole = torch.full((len(batch.token_ids), 1, topk), ABSENT, device=batch.token_ids.device)
                whole = whole.expand(-1, 1 + max(self.layers, default=0), -1)
            mine = self.of_this_rank(whole)
            found.append(Routes(tuple(to_stored(mine[:, seam.layer], seam.num_experts) for seam in self.seams)))
        return found

    def recorded(self, num_microbatches: int) -> list[Routes]:
        """The choices of the last run that recorded, one entry a micro-batch."""
        columns = [seam.recorded for seam in self.seams if seam.recorded is not None]
        return [Routes(tuple(column[index] for column in columns)) for index in range(num_microbatches)]

    def take_seconds(self) -> float:
        """Time spent with routes on this rank since the last call, on the host's clock."""
        total = sum(seam.seconds for seam in self.seams)
        for seam in self.seams:
            seam.seconds = 0.0
        return total

    def changes(self, which: Collection[int] | None = None) -> list[Tensor]:
        """[L] of [length buckets], float64: choices of the last run that differ from the routes that it was given.

        Args:
            which: micro-batches that count; None = all.
        """
        none = torch.zeros(len(BUCKET_NAMES), dtype=torch.float64)
        parts = [
            [part for index, part in seam.changed.items() if which is None or index in which] for seam in self.seams
        ]
        return [torch.stack(mine).sum(0) if mine else none for mine in parts]


def _install(router: Any, num_experts: int) -> RouterSeam:
    router.router_replay = RouterSeam(router.layer_number - 1, num_experts)
    return router.router_replay
