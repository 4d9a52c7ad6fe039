"""Seconds that sequences take of the ranks that share them, in one layer and all passes of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gspo_megatron.cluster.machines import Machine, machine_of
from gspo_megatron.config.schema import Recipe
from gspo_megatron.parallel import Layout
from gspo_megatron.plan.estimate.attention_time import Slot, beside_scores, scores_seconds, token_seconds
from gspo_megatron.plan.estimate.layer_time import head_time, layer_time
from gspo_megatron.plan.estimate.practice import practice_of


class SequenceTime:
    """The cost of sequences that 1, 2, 4, ... context-parallel ranks share: scored once and trained on once.

    As a cost of `pack_shared`, times of sequences in one pack add up: each hides its own part of the ring of keys and
    values. In a pack the scores of all hide the ring of all, which is no more: `seconds`.
    """

    def __init__(self, recipe: Recipe, layout: Layout, machine: Machine | None = None) -> None:
        """Take rates from the estimates of `gspo plan`.

        Args:
            recipe: of the run.
            layout: of its policy.
            machine: that it runs on; None = the recipe's.
        """
        self._arch, self._machine, self._practice = recipe.arch, machine or machine_of(recipe), practice_of(recipe)
        self._layouts = {size: replace(layout, context=size) for size in layout.context_sizes}
        self._exchange = {
            size: token_seconds(self._arch, one, self._machine, self._practice) for size, one in self._layouts.items()
        }
        self._layers, self._context = self._arch.num_hidden_layers / layout.pipeline, layout.context
        self._forwards = 3 if recipe.trainer.recompute == "full" else 2
        full = Slot(recipe.trainer.micro_batch_tokens / layout.context, 1.0)
        layer = layer_time(self._arch, layout, self._machine, full, self._practice)
        score, train = head_time(self._arch, layout, self._machine, full, self._practice)
        forward, back = layer.attention + layer.mixer, layer.attention_back + layer.mixer_back
        both = forward.times(self._forwards) + back
        self.slot = both.launches
        """Seconds of a micro-batch that depend on no size."""
        head = (score.total + train.total) / self._arch.num_hidden_layers
        self._token = (both.total - both.attention - both.launches + head) / full.tokens

    def __call__(self, length: int, ranks: int) -> float:
        """Seconds of each of `ranks` ranks for a sequence of `length` tokens."""
        return self.seconds([length], ranks)

    def floor(self, length: int, ranks: int) -> float:
        """Seconds without what the ranks exchange: what a sequence adds to any pack at least."""
        scores = scores_seconds(self._arch, self._layouts[ranks], self._machine, [Slot(length / ranks, length)])
        return length / ranks * self._token + self._forwards * scores[0] + scores[1]

    def seconds(self, lengths: Sequence[int], ranks: int) -> float:
        """Seconds of each of `ranks` ranks for a pack of sequences, without `slot`."""
        slots, layout = [Slot(length / ranks, length) for length in lengths], self._layouts[ranks]
        scores, tokens = scores_seconds(self._arch, layout, self._machine, slots), sum(lengths) / ranks
        forward, back = beside_scores(layout, scores, tokens, self._exchange[ranks])
        return tokens * self._token + self._forwards * forward + back

    def batch(self, lengths: Sequence[int], num_ranks: int) -> float:
        """Seconds of a whole batch, spread evenly over so many data-parallel ranks: all layers that a rank holds."""
        return self.seconds(lengths, self._context) * self._layers / num_ranks
