"""Batches for the tests of the objective: answers as the oracle wants them, and the same packed for the engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from gspo_megatron.objective import BatchTotals, LossInputs, LossOutput, ObjectiveSpec, add_sums, policy_loss
from tests.places import DATA
from tests.reference import Response
from tests.waiting import HANG

FIXTURES: dict[str, Any] = json.loads((DATA / "objective_vectors.json").read_text())
EXAMPLES = settings(deadline=None, derandomize=True, max_examples=25)
"""Drawn cases: the same ones in every run, and no clock, because machines are shared."""
PRESET_NAMES = (
    "gspo",
    "gspo_token",
    "grpo",
    "grpo_replay",
    "dr_grpo",
    "dapo",
    "cispo",
    "sapo",
    "gmpo",
    "luspo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "minpro",
    "minirl",
    "ppo",
    "distillation",
)


WHOLE_ROWS = ("minpro",)
"""Presets that look along a sequence: it lies on one rank as a whole."""


def preset(name: str) -> ObjectiveSpec:
    """A preset with the number it leaves to the recipe."""
    spec = ObjectiveSpec.preset(name)
    return spec.replace(aggregation_length=16) if spec.aggregation == "constant" else spec


def as_answers(
    log_ratios: Sequence[Sequence[float]],
    advantages: Sequence[float] | Sequence[Sequence[float]],
    old: float = -1.3,
) -> list[Response]:
    """Fixture rows as answers with one old log-prob for all tokens."""
    answers = []
    for row, advantage in zip(log_ratios, advantages, strict=True):
        base = torch.full((len(row),), old, dtype=torch.float64)
        per_token = list(advantage) if isinstance(advantage, Sequence) else [advantage] * len(row)
        current = base + torch.tensor(row, dtype=torch.float64)
        advantages_of_tokens = torch.tensor(per_token, dtype=torch.float64)
        zero = torch.zeros_like(base)
        answers.append(
            Response(
                current, base, advantages_of_tokens, sampler=base.clone(), value=zero, old_value=zero, returns=zero
            )
        )
    return answers


def random_answers(
    seed: int, spread: float = 2e-3, count: int = 6, longest: int = 12, token_advantages: bool = False
) -> list[Response]:
    """Answers whose mean log-ratios lie about `spread` apart, inside and outside of every band."""
    draw = torch.Generator().manual_seed(seed)
    answers = []
    for _ in range(count):
        length = int(torch.randint(1, longest + 1, (), generator=draw))
        old = -torch.rand(length, generator=draw, dtype=torch.float64) * 3 - 0.05
        shift = torch.randn((), generator=draw, dtype=torch.float64) * spread
        wiggle = torch.randn(length, generator=draw, dtype=torch.float64) * 0.3
        gap = torch.randn(length, generator=draw, dtype=torch.float64) * 0.4
        if token_advantages:
            advantage = torch.randn(length, generator=draw, dtype=torch.float64)
        else:
            advantage = torch.randn((), generator=draw, dtype=torch.float64).expand(length).clone()
        logp = old + shift + wiggle - wiggle.mean()
        answers.append(Response(logp, old, advantage, sampler=old - gap, reference=old + gap.flip(0) / 2))
    for answer in answers:
        answer.old_value, move, answer.returns = torch.randn(3, answer.length, generator=draw, dtype=torch.float64)
        answer.value = answer.old_value + move / 4
    return answers


@dataclass
class Row:
    """One sequence with untrained positions between the trained ones, garbage in them."""

    answer: Response
    leaf: Tensor
    """[n] the trained log-probs, a leaf."""
    positions: list[int]
    """Where they stand in the row."""
    length: int
    garbage: float = float("nan")
    staleness: Tensor | None = None
    """[n] weight versions since each trained token."""
    value: Tensor | None = None
    """[n] the critic's values, a leaf."""

    def full(self, values: Tensor) -> Tensor:
        """[n] -> [length], garbage at untrained positions."""
        row = torch.full((self.length,), self.garbage, dtype=values.dtype)
        return row.index_put((torch.tensor(self.positions, dtype=torch.int64),), values) if self.positions else row

    def mask(self) -> Tensor:
        mask = torch.zeros(self.length, dtype=torch.bool)
        mask[self.positions] = True
        return mask


def as_rows(
    answers: Sequence[Response],
    seed: int | None = None,
    garbage: float = float("nan"),
    dtype: torch.dtype = torch.float64,
) -> list[Row]:
    """Rows without untrained positions, or with some drawn from a seed: a prompt, tool output, padding."""
    draw = torch.Generator().manual_seed(seed or 0)
    rows = []
    for answer in answers:
        extra = 0 if seed is None else int(torch.randint(0, 7, (), generator=draw))
        order = torch.randperm(answer.length + extra, generator=draw)[: answer.length].sort().values
        leaf = answer.logp.detach().to(dtype).requires_grad_()
        value = None if answer.value is None else answer.value.detach().to(dtype).requires_grad_()
        rows.append(Row(answer, leaf, order.tolist(), answer.length + extra, garbage, value=value))
    return rows


@dataclass
class Layout:
    """How rows are spread: ranks of data parallelism, each with micro-batches, cut over context-parallel ranks."""

    microbatches: list[list[int]]
    """Row indices of each micro-batch, whatever rank it is on: ranks only add shares."""
    context: int = 1
    token_advantages: bool = False


def zigzag(length: int, context: int, rank: int) -> list[int]:
    """Positions of a row that a context-parallel rank holds: chunks r and 2C-1-r of 2C."""
    chunk = -(-length // (2 * context))
    mine = [*range(rank * chunk, (rank + 1) * chunk)]
    if context > 1:
        other = 2 * context - 1 - rank
        mine += range(other * chunk, (other + 1) * chunk)
    else:
        mine += range(chunk, 2 * chunk)
    return [at for at in mine if at < length]


def known(values: Tensor | None) -> Tensor:
    """Log-probs that an answer must have for this case."""
    assert values is not None
    return values


def loss_inputs(
    rows: Sequence[Row],
    totals: BatchTotals,
    context: int = 1,
    rank: int = 0,
    token_advantages: bool = False,
    sampler: bool = True,
    reference: bool = True,
) -> LossInputs:
    """One micro-batch as a context-parallel rank sees it."""
    keep = [torch.tensor(zigzag(row.length, context, rank), dtype=torch.int64) for row in rows]
    lengths = [k.numel() for k in keep]

    def packed(values: Sequence[Tensor | None]) -> Tensor:
        parts = [row.full(known(v).to(row.leaf.dtype))[k] for row, v, k in zip(rows, values, keep, strict=True)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

    mask = [row.mask()[k] for row, k in zip(rows, keep, strict=True)]
    per_sequence = [float(row.answer.advantage[0]) if row.answer.length else 0.0 for row in rows]
    return LossInputs(
        logprobs=packed([row.leaf for row in rows]),
        old_logprobs=packed([row.answer.old for row in rows]),
        advantages=packed([row.answer.advantage for row in rows])
        if token_advantages
        else torch.tensor(per_sequence, dtype=torch.float64),
        loss_mask=torch.cat(mask) if mask else torch.empty(0, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        totals=totals,
        rollout_logprobs=packed([row.answer.sampler for row in rows]) if sampler else None,
        reference_logprobs=packed([row.answer.reference for row in rows])
        if reference and all(row.answer.reference is not None for row in rows)
        else None,
        staleness=packed([row.staleness for row in rows])
        if rows and all(row.staleness is not None for row in rows)
        else None,
        token_advantages=token_advantages,
        **{
            name: packed([row.value if name == "values" else getattr(row.answer, field) for row in rows])
            for name, field in (("values", "value"), ("old_values", "old_value"), ("returns", "returns"))
            if all(row.value is not None for row in rows)
        },
    )


def totals_of(rows: Sequence[Row]) -> BatchTotals:
    lengths = [row.answer.length for row in rows]
    return BatchTotals(sequences=sum(n > 0 for n in lengths), tokens=sum(lengths))


def engine(
    spec: ObjectiveSpec, rows: Sequence[Row], layout: Layout | None = None
) -> tuple[float, list[Tensor], dict[str, Any]]:
    """(J, dJ/dlogp of each answer, reduced metric sums) by the engine, in a layout."""
    layout = layout or Layout([list(range(len(rows)))])
    totals, outputs = totals_of(rows), []
    for indices in layout.microbatches:
        part = [rows[i] for i in indices]
        outputs += over_context(
            layout.context,
            lambda rank, add, part=part: policy_loss(
                spec,
                loss_inputs(part, totals, layout.context, rank, layout.token_advantages or spec.has_token_advantages),
                add,
            ),
        )
    loss = torch.stack([out.loss.double() for out in outputs]).sum()
    used = [row.leaf for row in rows]
    grads = torch.autograd.grad(loss, used, allow_unused=True)
    grads = [torch.zeros_like(leaf) if g is None else -g for leaf, g in zip(used, grads, strict=True)]
    sums = add_sums([out.metrics for out in outputs])
    return -loss.item(), grads, {name: value.tolist() for name, value in sums.items()}


def as_sums(numbers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Metric sums of `engine` as the package holds them."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}


def over_context(context: int, run: Callable[[int, Callable[[Tensor], Tensor]], LossOutput]) -> list[LossOutput]:
    """Run every context-parallel rank in a thread of its own, with a sum that waits for all of them."""
    if context == 1:
        return [run(0, lambda values: values)]
    barrier, slots = threading.Barrier(context, timeout=HANG), [torch.empty(0)] * context
    results: list[LossOutput | None] = [None] * context
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        def add(values: Tensor) -> Tensor:
            assert not values.requires_grad
            slots[rank] = values
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        try:
            results[rank] = run(rank, add)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(context)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [result for result in results if result is not None]


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    """Gradients of every answer agree."""
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape, (index, a.shape, b.shape)
        if a.numel():
            worst = float((a.double() - b.double()).abs().max())
            assert worst <= tolerance, f"answer {index}: gradients differ by {worst:.2e}\n{a}\n{b}"


def near(printed: float) -> Any:
    """Equal to 1e-10, or to the ten digits that were printed."""
    return pytest.approx(printed, abs=max(1e-10, 6e-10 * abs(printed)))


def check_grads(grads: Sequence[Tensor], printed: Sequence[Sequence[float]]) -> None:
    for grad, row in zip(grads, printed, strict=True):
        for got, expected in zip(grad.tolist(), row, strict=False):  # rows are padded with zeros
            assert got == near(expected)


def run(spec: ObjectiveSpec, log_ratios: Any, advantages: Any, old: float = -1.3, **layout: Any) -> Any:
    rows = as_rows(as_answers(log_ratios, advantages, old))
    return engine(spec, rows, Layout([list(range(len(rows)))], **layout))
