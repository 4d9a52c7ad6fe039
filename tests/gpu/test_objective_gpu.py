"""The objective on a GPU: no host synchronisation, the numbers of the CPU, and its time at 128K tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gspo_megatron.objective import BatchTotals, LossInputs, policy_loss
from tests.unit.objective.cases import PRESET_NAMES, preset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no NVIDIA GPU: synchronisation of the objective is unseen"
    ),
]


@pytest.fixture
def synchronisation_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def batch(
    device: str, num_tokens: int = 4096, num_sequences: int = 16, dtype: torch.dtype = torch.float64
) -> LossInputs:
    draw = torch.Generator().manual_seed(0)
    old = -torch.rand(num_tokens, generator=draw, dtype=dtype) * 3
    current = old + 1e-3 * torch.randn(num_tokens, generator=draw, dtype=dtype)
    sampler = old + 0.1 * torch.randn(num_tokens, generator=draw, dtype=dtype)
    return LossInputs(
        logprobs=current.to(device).requires_grad_(),
        old_logprobs=old.to(device),
        advantages=torch.randn(num_sequences, generator=draw, dtype=dtype).to(device),
        loss_mask=(torch.rand(num_tokens, generator=draw) < 0.9).to(device),
        cu_seqlens=torch.linspace(0, num_tokens, num_sequences + 1).round().int().to(device),
        totals=BatchTotals(num_sequences, num_tokens),
        rollout_logprobs=sampler.to(device),
        reference_logprobs=old.to(device),
    )


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_no_synchronisation(name: str, synchronisation_is_an_error: None) -> None:
    spec = preset(name).replace(correction=["tis", "geometric_mask", "opsm", "veto"], kl="k3", kl_coefficient=0.1)
    torch.cuda.set_sync_debug_mode("default")
    inputs = batch("cuda")
    torch.cuda.set_sync_debug_mode("error")
    policy_loss(spec, inputs).loss.backward()


def test_the_debug_mode_sees_a_synchronisation(synchronisation_is_an_error: None) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_the_gpu_has_the_numbers_of_the_cpu(name: str) -> None:
    here, there = batch("cpu"), batch("cuda")
    expected, got = policy_loss(preset(name), here), policy_loss(preset(name), there)
    expected.loss.backward()
    got.loss.backward()
    assert float(got.loss) == pytest.approx(float(expected.loss), abs=1e-12)
    assert here.logprobs.grad is not None and there.logprobs.grad is not None
    torch.testing.assert_close(there.logprobs.grad.cpu(), here.logprobs.grad, rtol=0, atol=1e-12)
    for metric, value in expected.metrics.items():
        torch.testing.assert_close(got.metrics[metric].cpu(), value, rtol=1e-9, atol=1e-9)


def test_bad_values_are_counted_and_do_not_end_the_process() -> None:
    inputs = batch("cuda")
    with torch.no_grad():
        inputs.logprobs[5] = float("nan")
        inputs.loss_mask[5] = True
    out = policy_loss(preset("gspo"), inputs)
    assert float(out.metrics["nonfinite_tokens"]) == 1
    assert not torch.isfinite(out.loss)


def test_128k_tokens_take_a_few_milliseconds() -> None:
    inputs = batch("cuda", 131_072, 64, torch.float32)
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        policy_loss(preset("gspo"), inputs).loss.backward()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    assert sorted(times)[5] < 50, f"{times} ms"
