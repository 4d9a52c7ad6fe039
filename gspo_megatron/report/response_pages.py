"""Sampled responses for a browser: metadata of all, tokens of a page.

    catalogue = Catalogue(RunDir(run_dir))
    total, items = catalogue.page(Query(reward=(0, 0), order="longest"), offset=0, limit=10)

Only the indexes of the sample store are held; of the responses, those of the page are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gspo_megatron.models import load_resolved
from gspo_megatron.report.series import stretches
from gspo_megatron.run_dir import RunDir

if TYPE_CHECKING:  # numpy
    from gspo_megatron.data.log_ratios import StoredRatios
    from gspo_megatron.data.sample_index import StoredSample
    from gspo_megatron.data.tokenizers import Tokenizer

ANY = (-math.inf, math.inf)
HEAD, TAIL = 1500, 500
"""Tokens of a response that the page shows: from its start, and up to its end."""
SAMPLE_STEPS, SAMPLE_PER_STEP, SAMPLE_TOKENS = 20, 16, 150_000
"""What a page without a server holds: steps, responses of each, tokens of all of them."""
ORDERS: dict[str, Callable[[StoredSample], float]] = {
    "newest": lambda one: -one.step,
    "longest": lambda one: -one.ref.answer_length,
    "shortest": lambda one: one.ref.answer_length,
    "lowest": lambda one: one.reward,
    "highest": lambda one: -one.reward,
}
"""Sort keys by name; any other name leaves the order of step and prompt."""


@dataclass(frozen=True, slots=True)
class Query:
    """Which responses, and in which order; intervals hold both ends."""

    step: tuple[float, float] = ANY
    reward: tuple[float, float] = ANY
    length: tuple[float, float] = ANY
    """Tokens of the response."""
    clipped: bool = False
    """Only those cut at the limit."""
    lost: str = ""
    """Only those that the objective clipped: `left`, `right`, or `either` side; empty = all."""
    prompt: int | None = None
    """Only those to one prompt of the stream."""
    contains: str = ""
    """Text of the question, in any case of letters."""
    order: str = "stored"
    """A name of ORDERS."""

    def wants(self, one: StoredSample) -> bool:
        """Whether a response is asked for."""
        fits = self.step[0] <= one.step <= self.step[1] and self.reward[0] <= one.reward <= self.reward[1]
        fits = fits and self.length[0] <= one.ref.answer_length <= self.length[1]
        fits = fits and (self.prompt is None or one.ref.prompt_index == self.prompt)
        return fits and (one.is_clipped or not self.clipped) and self.contains.casefold() in one.question.casefold()


class Catalogue:
    """The responses of one run, also while it writes more."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._steps: dict[int, tuple[float, list[StoredSample]]] = {}
        self._trained: dict[int, tuple[float, dict[tuple[int, int], StoredRatios]]] = {}

    def samples(self, wanted: Callable[[int], bool] = lambda step: True) -> Iterator[StoredSample]:
        """Metadata of the responses that are still kept, in order of step and prompt; an index is read once.

        Raises:
            ValueError: an index is damaged.
        """
        from gspo_megatron.data.sample_index import INDEX, read_samples

        found = INDEX.find(self._run.samples)
        self._steps = {step: one for step, one in self._steps.items() if step in found}
        for step, file in found.items():
            if not wanted(step):
                continue
            try:
                written = file.stat().st_mtime
                if self._steps.get(step, (None,))[0] != written:
                    samples = list(read_samples(self._run.samples, lambda number, step=step: number == step))
                    self._steps[step] = (written, samples)
            except FileNotFoundError:  # it was removed meanwhile: `rollout.keep_samples`
                continue
            yield from self._steps[step][1]

    def page(self, query: Query, offset: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
        """One page of what is asked for.

        Returns:
            How many there are, and up to `limit` of them from `offset` on, with their tokens.
        """
        found = [one for one in self.samples() if query.wants(one) and self._is_lost(one, query.lost)]
        if query.order in ORDERS:
            found.sort(key=ORDERS[query.order])
        return len(found), [self.read(one) for one in found[offset : offset + limit]]

    def _ratios(self, sample: StoredSample) -> StoredRatios | None:
        """What is stored of the training pass of a response; a step is looked up again when its files changed."""
        from gspo_megatron.data.log_ratios import TRAINED, find_log_ratios

        directory = self._run.samples / TRAINED.name(sample.step)
        try:
            written = directory.stat().st_mtime
        except OSError:  # no pass of it yet, or removed
            return None
        if self._trained.get(sample.step, (None,))[0] != written:
            self._trained[sample.step] = (written, find_log_ratios(self._run.samples, sample.step))
        found = self._trained[sample.step][1].get((sample.ref.prompt_index, sample.ref.sample_index))
        return found if found is not None and found.length == sample.ref.answer_length else None

    def _is_lost(self, sample: StoredSample, side: str) -> bool:
        if not side:
            return True
        found = self._ratios(sample)
        shares = {} if found is None else {"left": found.left, "right": found.right, "either": found.left + found.right}
        return shares.get(side, 0.0) > 0

    def read(self, sample: StoredSample, head: int = HEAD, tail: int = TAIL) -> dict[str, Any]:
        """A response with its tokens: the text of each, and the log-prob of the sampler; null where it was inserted.

        `log_ratios` has what the trainer said of them less that, or nothing where no pass was stored.
        """
        from gspo_megatron.data.store import DamagedSample, SampleStore

        ref = sample.ref
        one: dict[str, Any] = {
            "step": sample.step, "prompt": ref.prompt_index, "sample": ref.sample_index, "reward": sample.reward,
            "length": ref.answer_length, "stop_reason": ref.stop_reason, "unscored": ref.unscored,
            "question": sample.question, "gold": sample.gold, "tokens": [], "head": head, "left_out": 0,
            "log_ratios": [], "clipped": None,
            "versions": [ref.segments[0].version, ref.segments[-1].version] if ref.segments else [],
        }  # fmt: skip
        if not self._run.samples.is_dir():  # a store would make it
            return one | {"unscored": "the samples were removed"}
        try:
            ids, start, logprobs = SampleStore(self._run.samples).read(ref)
        except DamagedSample:
            return one | {"unscored": "its tokens are no longer on the disk"}
        answer, length = ids[start:], ref.answer_length
        kept = list(range(length)) if length <= head + tail else [*range(head), *range(length - tail, length)]
        texts = self._tokenizer.pieces([int(answer[at]) for at in kept])
        inserted = {at for masked in ref.masked for at in range(masked.start, masked.end)}
        tokens = [
            [text, None if at in inserted or not math.isfinite(logprobs[at]) else float(logprobs[at])]
            for at, text in zip(kept, texts, strict=True)
        ]
        return one | {"tokens": tokens, "left_out": length - len(kept)} | self._passed(sample, kept)

    def _passed(self, sample: StoredSample, kept: list[int]) -> dict[str, Any]:
        """What a training pass said of the shown tokens of a response."""
        found = self._ratios(sample)
        if found is None:
            return {}
        try:
            ratios = found.read()
        except (OSError, ValueError):  # it was removed meanwhile
            return {}
        values = [float(ratios[at]) if math.isfinite(ratios[at]) else None for at in kept]
        return {"log_ratios": values, "clipped": {"left": found.left, "right": found.right}}

    def draw(self) -> tuple[int, list[dict[str, Any]]]:
        """A sample for a page without a server, the same each time.

        Returns:
            Responses of the steps that it was drawn from; and those drawn: of up to 20 of the kept steps, the first and
            the last among them, up to 16 responses at equal distances, 150,000 tokens in all.
        """
        from gspo_megatron.data.sample_index import list_steps

        steps = list_steps(self._run.samples)
        count = min(len(steps), SAMPLE_STEPS)
        chosen = {steps[at * (len(steps) - 1) // max(1, count - 1)] for at in range(count)}
        found = list(self.samples(chosen.__contains__))
        drawn: list[StoredSample] = []
        for step in sorted(chosen):
            of_step = [one for one in found if one.step == step]
            cuts = stretches(len(of_step), min(len(of_step), SAMPLE_PER_STEP))
            drawn += [of_step[start] for start, _ in cuts]
        share = SAMPLE_TOKENS // max(1, len(drawn))
        head, tail = (HEAD, TAIL) if share >= HEAD + TAIL else (share * 3 // 4, share // 4)
        return len(found), [self.read(one, head, tail) for one in drawn]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from gspo_megatron.data.tokenizers import load_tokenizer

        recipe = load_resolved(self._run.recipe)
        return load_tokenizer(recipe.tokenizer, recipe.model.path)
