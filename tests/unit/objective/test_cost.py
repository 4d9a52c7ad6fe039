"""The engine costs nothing and never waits for a device."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_megatron.objective import BatchTotals, LossInputs, loss, policy_loss
from tests.unit.objective.cases import PRESET_NAMES, preset

# Operators whose result lives on the host, or whose shape depends on values: on a GPU each one waits for the device.
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "_to_copy.cpu")


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert name not in WAITING and not name.startswith("_unique"), f"{func} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{func} with a mask waits for the device"
        return func(*args, **(kwargs or {}))


def batch(num_tokens: int, num_sequences: int, per_token: bool = False) -> LossInputs:
    draw = torch.Generator().manual_seed(0)
    old = -torch.rand(num_tokens, generator=draw) * 3
    current = (old + 1e-3 * torch.randn(num_tokens, generator=draw)).requires_grad_()
    cuts = torch.linspace(0, num_tokens, num_sequences + 1).round().int()
    mask = torch.rand(num_tokens, generator=draw) < 0.9
    advantages = torch.randn(num_tokens if per_token else num_sequences, generator=draw)
    return LossInputs(
        current, old, advantages, mask, cuts, BatchTotals(num_sequences, num_tokens),
        old + 0.1 * torch.randn(num_tokens, generator=draw), old,
        values=current.detach().clone().requires_grad_(), old_values=old, returns=old + 1,
    )  # fmt: skip


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_nothing_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators that a GPU would run, seen on CPU; the check of values is left out, as it is there."""
    monkeypatch.setattr(loss, "check_values", lambda inputs: None)
    spec = preset(name).replace(correction=["tis", "geometric_mask", "opsm", "veto"], kl="k3", kl_coefficient=0.1)
    inputs = batch(64, 4, spec.has_token_advantages)
    with NoWaiting():
        policy_loss(spec, inputs).loss.backward()


def test_the_guard_above_sees_a_wait() -> None:
    for wait in (lambda x: x.item(), lambda x: x[x > 0], lambda x: bool(x.sum() > 0), lambda x: x.nonzero()):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            wait(torch.ones(1))


def test_128k_tokens_take_milliseconds() -> None:
    """About 25 ms of one core, forward and backward; processor time, so that other work does not count."""
    torch.set_num_threads(1)
    inputs, best = batch(131_072, 512), float("inf")
    for _ in range(5):
        started = time.process_time()
        policy_loss(preset("gspo"), inputs).loss.backward()
        best = min(best, time.process_time() - started)
    assert best < 0.25
