"""Groups of responses until they are in a batch: how many are started, which are trained on, why others are dropped.

Three keys decide. With `rollout.max_staleness=0` a batch is sampled under one version of the weights; responses started
beyond it (`rollout.over_provision`) are cut when the batch is full. With more, they stay in flight for later batches:
where the servers share the trainer's GPUs they stop and are continued under new weights (partial rollout), elsewhere
they continue while the trainer works. The oldest groups are chosen first, and a batch waits for a group that could not
be trained on in time later: the bound is never exceeded.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Awaitable, Callable, Sequence

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.groups import Group, TokenCounter, TokenLedger
from gspo_megatron.controller.scheduler import Scheduler
from gspo_megatron.controller.servers import Refused
from gspo_megatron.transport.messages import Accounting
from gspo_megatron.types import Prompt, SampleRef, StopReason, are_equal

MAX_FILTERED = 20
"""Batches' worth of groups in a row that may be filtered before the run ends, because it learns nothing."""


class GroupBuffer:
    """Keeps as many groups in flight as the recipe allows and hands out batches of complete ones."""

    def __init__(
        self,
        recipe: Recipe,
        scheduler: Scheduler,
        draw: Callable[[int], Awaitable[list[Prompt]]],
        score: Callable[[Generation, StopReason], Awaitable[SampleRef]],
        sampling: Sampling,
        version: Callable[[], int | None],
        overlaps: bool,
        counter: TokenCounter,
    ) -> None:
        """
        Args:
            recipe: `batch`, `rollout` and the objective's group filter are read.
            scheduler: completes generations.
            draw: the next prompts.
            score: score and store a finished response.
            sampling: how responses are drawn.
            version: weights of the servers.
            overlaps: servers continue while the trainer works.
            counter: counts what they sample.
        """
        rollout, self._size, self._answers = recipe.rollout, recipe.batch.prompts, recipe.batch.answers
        self._staleness, self._overlaps = rollout.max_staleness, overlaps
        share = rollout.max_staleness if rollout.over_provision is None else rollout.over_provision
        self._extra = math.ceil(share * self._size)
        if self._staleness:
            self._extra = min(self._extra, self._staleness * self._size)
        self._filters = recipe.objective.group_filter == "dynamic_sampling"
        self._scheduler, self._draw, self._judge = scheduler, draw, score
        self._sampling, self._version = sampling, version
        self.groups: list[Group] = []
        """Under way or complete, not handed out; in the order of their prompts."""
        self.ledger = TokenLedger()
        self._counter = counter
        self.ledger.settle((), counter)
        self.limit: int | None = None
        """Longest response to a prompt that is started now; None = the sampling's own limit."""
        self._taking = False
        self._filtered = 0
        self._running: dict[Generation, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self.admitting = asyncio.Lock()
        """Held while prompts are on their way from the stream to `groups`."""
        self._fault: BaseException | None = None

    async def take(self) -> list[Group]:
        """The next batch: `batch.prompts` complete groups, none older than `rollout.max_staleness` allows.

        Raises:
            Refused: no server is left, or nothing but groups of equal rewards comes.
        """
        self._taking = True
        self._scheduler.resume()
        await self._drop_too_old()
        for group in self.groups:
            self._start(group)
        await self._admit()
        while True:
            if self._fault is not None:
                raise self._fault
            chosen = self._choose()
            if chosen:
                break
            self._changed.clear()
            await self._changed.wait()
        self._taking = False
        for group in chosen:
            self._check_versions(group)
            self.groups.remove(group)
            self.ledger.take(group)
        await self._leave_off()
        return sorted(chosen, key=lambda group: group.prompt.index)

    def done(self) -> tuple[int, int]:
        """Finished members of the groups at hand, and their tokens."""
        refs = [ref for group in self.groups for ref in group.finished.values()]
        return len(refs), sum(ref.trained_length for ref in refs)

    def restore(self, groups: Sequence[Group], accounting: Accounting) -> None:
        """Go on from a checkpoint's groups and accounting."""
        self.groups[:] = groups
        for group in groups:
            for generation in group.generations:
                generation.received = self._counter.add
        self.ledger.restore(accounting)
        self.ledger.settle(groups, self._counter)

    async def close(self) -> None:
        """End all tasks."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _choose(self) -> list[Group] | None:
        """A batch of complete groups, oldest first, if every other group can still be trained on in time."""
        version = self._version()
        complete = [group for group in self.groups if group.is_complete]
        if version is None or len(complete) < self._size:
            return None
        chosen = sorted(complete, key=lambda group: self._last_version(group, version))[: self._size]
        rest = [group for group in self.groups if group not in chosen]
        for later in range(self._staleness):
            due = sum(self._last_version(group, version) <= version + later for group in rest)
            if due > later * self._size:
                return None
        return chosen

    def _last_version(self, group: Group, version: int) -> int:
        """Of the last batch that may train on a group; one that is not started would start now."""
        return (version if group.first_version is None else group.first_version) + self._staleness

    async def _drop_too_old(self) -> None:
        """Drop what cannot be trained on within the bound any more: a failed update leaves a version out."""
        version = self._version()
        assert version is not None
        dated = sorted(self.groups, key=lambda group: group.tokens)
        for later in range(-1, self._staleness):
            due = [group for group in dated if self._last_version(group, version) <= version + later]
            for group in due[: max(0, len(due) - (later + 1) * self._size)]:
                tasks = [self._running[generation] for generation in group.generations if generation in self._running]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                dated.remove(group)
                self.groups.remove(group)
                self._drop(group, "too-stale")

    def _check_versions(self, group: Group) -> None:
        """The bound, held against what the servers themselves say of every token."""
        newest = self._version()
        assert newest is not None
        versions = {span.version for ref in group.members for span in ref.segments}
        if not versions <= set(range(newest - self._staleness, newest + 1)):
            raise Refused(
                f"prompt {group.prompt.index} was answered with weights of version {sorted(versions)}, where "
                f"version {newest} and rollout.max_staleness={self._staleness} allow {newest - self._staleness} to "
                f"{newest}; a server holds other weights than it was given"
            )

    async def _leave_off(self) -> None:
        """What happens to the other groups while the trainer works."""
        if not self._staleness:
            await self._stop()
            for group in self.groups:
                self._drop(group, "cut")
            self.groups.clear()
        elif self._overlaps:
            await self._admit()
        else:
            await self._stop()

    async def _stop(self) -> None:
        """Interrupt what is in flight; the generations stay as they are."""
        await self._scheduler.interrupt()
        await asyncio.gather(*self._running.values())

    async def _admit(self) -> None:
        """Begin groups up to what is allowed now."""
        async with self.admitting:
            allowed = self._extra + (self._size if self._taking else 0)
            if not self._taking and not (self._staleness and self._overlaps):
                return
            missing = allowed - len(self.groups)
            if missing <= 0:
                return
            self._begin(await self._draw(missing))

    def _begin(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            members = [
                Generation(prompt, i, received=self._counter.add, limit=self.limit) for i in range(self._answers)
            ]
            group = Group(prompt, members)
            self.groups.append(group)
            self._start(group)

    def _start(self, group: Group) -> None:
        """Bring the unfinished members of a group to their end in the background."""
        for generation in group.generations:
            if generation.sample_index not in group.finished and generation not in self._running:
                task = self._running[generation] = asyncio.create_task(self._finish(group, generation))
                task.add_done_callback(functools.partial(self._ended, generation))

    def _ended(self, generation: Generation, task: asyncio.Task[None]) -> None:
        del self._running[generation]
        if not task.cancelled() and task.exception() is not None:
            self._fault = self._fault or task.exception()
            self._changed.set()

    async def _finish(self, group: Group, generation: Generation) -> None:
        reason = await self._scheduler.complete(generation, self._sampling)
        if reason == "abort":
            return
        group.finished[generation.sample_index] = await self._judge(generation, reason)
        if group.is_complete:
            if self._filters:
                await self._filter(group)
            self._changed.set()

    async def _filter(self, group: Group) -> None:
        """Replace a group whose rewards are all equal: its advantages would all be 0."""
        if not are_equal([ref.reward for ref in group.members]):
            self._filtered = 0
            return
        self.groups.remove(group)
        self._drop(group, "equal-rewards")
        self._filtered += 1
        if self._filtered > MAX_FILTERED * self._size:
            raise Refused(
                f"{self._filtered} groups in a row have equal rewards (the last {group.members[0].reward:g}), so "
                "objective.group_filter=dynamic_sampling leaves nothing to train on; check the reward, or change the "
                "difficulty of the problems"
            )
        await self._admit()

    def _drop(self, group: Group, reason: str) -> None:
        """Count a group that is not trained on, and end the agents that work on it."""
        for generation in group.generations:
            self._scheduler.forget(generation)
        self.ledger.drop(group, reason)
