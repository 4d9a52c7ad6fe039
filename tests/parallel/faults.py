"""Faults that other implementations shipped, planted in the running policy one at a time.

Each is a context manager that replaces one function by a slightly wrong one. `tools/planted_faults_policy.py` runs the
parity rows under each and prints what turned red.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

QWEN3_SETTINGS = "gspo_megatron.models.qwen3.megatron_settings"
QWEN3_TABLE = "gspo_megatron.models.qwen3.weight_table"
MEGATRON_FINALIZE = "megatron.core.distributed.finalize_model_grads"


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Put `make(original)` in the place of an attribute."""
    owner = importlib.import_module(owner) if isinstance(owner, str) else owner
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def of_policy(name: str, make: Callable[[Any], Any]) -> AbstractContextManager[None]:
    """Replace a method of the policy."""
    from gspo_megatron.policy.policy import Policy

    return replaced(Policy, name, make)


def scale(wrong: Callable[[Any, Tensor, int], Tensor]) -> AbstractContextManager[None]:
    """Replace the one function that turns a share into Megatron's scale."""
    return of_policy("scale_share", lambda _: wrong)


def contiguous(_: Any) -> Callable[[Tensor, int, int], Tensor]:
    """Context-parallel rank r holds the r-th block of each sequence."""

    def cut(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
        parts = []
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            part = (end - start) // size
            parts.append(torch.arange(start + rank * part, start + (rank + 1) * part))
        return torch.cat(parts)

    return cut


def unreduced_qk_norms(original: Any) -> Any:
    """Query and key norms keep the gradient of this rank's heads alone."""

    def reduce(model: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        for chunk in model:
            for name, parameter in chunk.named_parameters():
                if "q_layernorm" in name or "k_layernorm" in name:
                    parameter.sequence_parallel = False
        return original(model, dataclasses.replace(config, qk_layernorm=False), *args, **kwargs)

    return reduce


def unreduced_routers(original: Any) -> Any:
    """The routers keep the gradient of this rank's tokens alone."""

    def reduce(model: Any, *args: Any, **kwargs: Any) -> Any:
        for chunk in model:
            for name, parameter in chunk.named_parameters():
                if "router" in name:
                    parameter.sequence_parallel = False
        return original(model, *args, **kwargs)

    return reduce


def scaled_experts(original: Any) -> Any:
    """Expert gradients count once for every rank that sends tokens to them."""

    def finalize(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs)
        for chunk in model:
            for parameter in chunk.parameters():
                if not getattr(parameter, "allreduce", True):
                    parameter.main_grad.mul_(chunk.config.expert_model_parallel_size)
        return result

    return finalize


def rope_from_rank_zero(original: Any) -> Any:
    """Every context-parallel rank rotates by the positions of the first."""
    from gspo_megatron.policy.attention import zigzag_indices

    return lambda starts, own: original(starts, zigzag_indices(starts, 0, int(starts[-1]) // len(own)))


def flat_qkv(_: Any) -> Any:
    """All queries, then all keys, then all values."""
    from gspo_megatron.models.hf_table import Parameter, Piece

    def table(name: str, prefix: str, arch: Any, index: int, count: int) -> Parameter:
        pieces, row = [], 0
        for tensor, heads in (
            ("q_proj", arch.num_attention_heads),
            ("k_proj", arch.num_key_value_heads),
            ("v_proj", arch.num_key_value_heads),
        ):
            part = heads * arch.head_dim // count
            source = (index * part, (index + 1) * part)
            at = (row, row + part)
            pieces.append(Piece(f"{prefix}{tensor}.weight", source, (0, arch.hidden_size), at))
            row += part
        return Parameter(name, (row, arch.hidden_size), tuple(pieces))

    return table


def swapped_gate_and_up(original: Any) -> Any:
    """The up projection lies before the gate."""

    def table(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for entry in original(*args, **kwargs):
            if len(entry.pieces) == 2:
                first, second = entry.pieces
                swapped = (dataclasses.replace(second, at=first.at), dataclasses.replace(first, at=second.at))
                entry = dataclasses.replace(entry, pieces=swapped)
            yield entry

    return table


def with_settings(**values: Any) -> Callable[[Any], Any]:
    """Add to what a function of settings returns."""
    return lambda original: lambda *args: {**original(*args), **values}


@contextmanager
def auxiliary_loss() -> Iterator[None]:
    """Megatron's default load balancing, past the assertion that refuses it."""
    settings = with_settings(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1e-3)
    with (
        replaced("gspo_megatron.models.megatron_engine", "_experts", settings),
        replaced("gspo_megatron.policy.policy", "assert_settings", lambda _: lambda *_: None),
    ):
        yield


def without_mark(original: Any) -> Any:
    """Norm weights that do not say they see only a part of the sequence."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, *args, **kwargs)
        self.weight.sequence_parallel = False

    return init


def other_epsilon(original: Any) -> Any:
    """1e-5 in place of 1e-6."""

    def init(self: Any, config: Any, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        original(self, config, hidden_size, eps=10 * eps, **kwargs)

    return init


def unsorted_without_gradients(original: Any) -> Any:
    """The scoring pass takes the chosen experts in another order than the training pass, as Megatron does."""

    def choose(scores: Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
        found = original(scores, k, *args, **kwargs)
        if k == 1 or torch.is_grad_enabled() or scores.dim() != 2:
            return found
        return torch.return_types.topk((found[0].flip(-1), found[1].flip(-1)))

    return choose


def stale_weight(original: Any) -> Any:
    """One parameter changes between the scoring and the training pass."""

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            next(self.chunks[0].parameters()).add_(1e-3)
        return original(self, *args, **kwargs)

    return train


def seeing_padding_and_neighbours(original: Any) -> Any:
    """Attention over the whole pack as if it were one sequence."""

    def plan(cu_seqlens: Tensor, *args: Any) -> Any:
        return original(cu_seqlens[[0, -1]], *args)

    return plan


FAULTS: dict[str, tuple[tuple[str, ...], Callable[[], AbstractContextManager[None]]]] = {
    "CP factor dropped": (
        ("TP2 CP2 EP2 ETP2", "CP2 EP4"),
        lambda: scale(lambda self, share, count: share * (count * self.layout.data) / self.layout.context),
    ),
    "1/micro-batches dropped": (
        ("TP2 EP2 ETP2",),
        lambda: scale(lambda self, share, count: share * self.layout.data),
    ),
    "DP factor dropped": (("TP2 EP2 ETP2",), lambda: scale(lambda self, share, count: share * count)),
    "blocks for zig-zag": (
        ("CP2 EP4",),
        lambda: replaced("gspo_megatron.policy.microbatch", "zigzag_indices", contiguous),
    ),
    "rope of rank 0 on every CP rank": (
        ("CP2 EP4",),
        lambda: replaced("gspo_megatron.policy.microbatch", "positions_of", rope_from_rank_zero),
    ),
    "sequence sums not added over CP": (
        ("CP2 EP4",),
        lambda: replaced(_share(), "sum", lambda _: lambda self, values: values),
    ),
    "QK-norm gradients not reduced over TP": (
        ("TP2 EP2 ETP2",),
        lambda: replaced(MEGATRON_FINALIZE, "_allreduce_non_tensor_model_parallel_grads", unreduced_qk_norms),
    ),
    "router gradients not reduced over TP": (
        ("TP2 EP2 ETP2",),
        lambda: replaced(MEGATRON_FINALIZE, "_allreduce_non_tensor_model_parallel_grads", unreduced_routers),
    ),
    "norms not marked for SP": (
        ("TP2 EP2 ETP2",),
        lambda: replaced(_norm(), "__init__", without_mark),
    ),
    "expert gradients times EP": (
        ("CP2 EP4",),
        lambda: replaced("gspo_megatron.policy.gradients", "finalize_model_grads", scaled_experts),
    ),
    "q, k, v packed flat": (
        ("TP2 EP2 ETP2",),
        lambda: replaced(QWEN3_TABLE, "cut_qkv", flat_qkv),
    ),
    "gate and up swapped": (
        ("TP2 EP2 ETP2",),
        lambda: replaced(QWEN3_TABLE, "cut_gated_mlp", swapped_gate_and_up),
    ),
    "softmax before top-k, not renormalised": (
        ("CP2 EP4",),
        lambda: replaced(
            "gspo_megatron.models.qwen3.megatron_settings", "_router", with_settings(moe_router_pre_softmax=True)
        ),
    ),
    "tied head not reduced over its two stages": (
        ("TP2 PP2",),
        lambda: replaced(MEGATRON_FINALIZE, "_allreduce_word_embedding_grads", lambda _: lambda *_, **__: None),
    ),
    "epsilon 1e-5": (("CP2 EP4",), lambda: replaced(_norm(), "__init__", other_epsilon)),
    "auxiliary loss 1e-3": (
        ("CP2 EP4",),
        auxiliary_loss,
    ),
    "attention across sequences": (
        ("TP2 EP2 ETP2",),
        lambda: replaced("gspo_megatron.policy.microbatch", "plan_buckets", seeing_padding_and_neighbours),
    ),
    "one stale weight": (("CP2 EP4",), lambda: of_policy("train", stale_weight)),
    "experts in another order without gradients": (
        ("CP2 EP4",),
        lambda: replaced(torch, "topk", unsorted_without_gradients),
    ),
}
"""Name -> (layouts of the rows that it is planted in, how)."""


def planted_in(name: str) -> tuple[str, ...]:
    """The layouts that a fault shows in."""
    return FAULTS[name][0]


def _norm() -> Any:
    from gspo_megatron.policy.specs import ReferenceNorm

    return ReferenceNorm


def _share() -> Any:
    from gspo_megatron.policy.mesh import ContextShare

    return ContextShare


def planted(name: str | None) -> AbstractContextManager[None]:
    """The fault of that name, or none."""
    return contextlib.nullcontext() if name is None else FAULTS[name][1]()
