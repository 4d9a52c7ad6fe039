"""Measure FLOPs, memory and error of the log-prob head against a reference that holds the logits in float64.

    python tools/bench_head.py [--json]

Without a GPU, hidden size and vocabulary are scaled down, and the result says so. One more case has the whole
vocabulary, because the workspace grows with chunk * vocabulary only. Each case runs in a separate process with
tensor-parallel size 1. Exits with 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
TEMPERATURE = 0.8
REFERENCE_ROWS = 2048
WORKSPACE_BOUND = 1.5e9
"""Most bytes besides hidden states, weight and their gradients, at the whole vocabulary."""
STABILITY_BOUND = 1e-6
"""Largest relative difference of a gradient between two chunk sizes, float32."""


@dataclass(frozen=True)
class Case:
    """The sizes of one measurement."""

    tokens: int
    hidden: int
    vocabulary: int
    chunk: int
    dtype: str
    scaled: bool
    """Whether hidden size or vocabulary are smaller than Qwen3-30B-A3B's 2048 and 151,936."""
    reference: bool = True
    """Whether the reference is computed; it takes too long at large sizes."""


HOST_CASES = [Case(tokens, 128, 9496, chunk, "float32", True) for tokens in (4096, 32768) for chunk in (1024, 256)]
HOST_CASES.append(Case(2048, 64, 151_936, 1024, "float32", True, reference=False))
GPU_CASES = [Case(tokens, 2048, 151_936, 1024, "bfloat16", False) for tokens in (4096, 32768)]
GPU_CASES.append(Case(131_072, 2048, 151_936, 1024, "bfloat16", False, reference=False))


class CountProducts(TorchDispatchMode):
    """Counts the FLOPs of matrix products, two for each multiply-add."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:] if name == "mm" and len(args) == 2 else args[:2] if name == "mm" else args[1:3]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states near the rows of their targets (so the entropy is a trained model's), weight, targets, signs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.vocabulary, case.hidden, generator=generator) * case.hidden**-0.5
    targets = torch.randint(0, case.vocabulary, (case.tokens,), generator=generator)
    noise = torch.randn(case.tokens, case.hidden, generator=generator)
    hidden = 8.0 * weight[targets] + noise
    signs = torch.randint(0, 2, (case.tokens,), generator=generator) * 2.0 - 1.0
    dtype = getattr(torch, case.dtype)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), signs.to(device)


def run_case(case: Case) -> dict[str, Any]:
    """Measure one size in this process."""
    sys.path.insert(0, str(ROOT))
    import gspo_megatron.policy  # noqa: F401
    from gspo_megatron.policy.head import chosen_logprobs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start_alone()
    torch.set_num_threads(1)
    hidden, weight, targets, signs = make_inputs(case, device)

    def both(chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        main_grad = torch.zeros_like(weight, dtype=torch.float32)
        head.main_grad = main_grad  # pyright: ignore[reportAttributeAccessIssue]  as Megatron's buffers hang there
        group = dist.group.WORLD
        assert group is not None
        warm = chosen_logprobs(leaf[:8], head, targets[:8], TEMPERATURE, chunk, group).logprobs
        warm.sum().backward()  # the first product makes room for the library that computes it
        leaf.grad = None
        main_grad.zero_()
        with WatchedMemory(device) as memory:
            logprobs, entropy, _ = chosen_logprobs(leaf, head, targets, TEMPERATURE, chunk, group)
            (logprobs * signs).sum().backward()
        assert leaf.grad is not None
        outputs = leaf.grad.nbytes + 3 * 4 * case.tokens
        measured["workspace_bytes"] = memory.peak - outputs
        return logprobs.detach(), entropy, leaf.grad, main_grad

    measured: dict[str, Any] = {}
    with CountProducts() as counted:
        began = time.perf_counter()
        found = both(case.chunk)
        seconds = time.perf_counter() - began
    operations = counted.operations
    workspace = measured["workspace_bytes"]
    other = both(case.chunk // 2)
    result = {
        **asdict(case),
        "operations": operations,
        "operations_over_2THV": operations / (2 * case.tokens * case.hidden * case.vocabulary),
        "seconds": seconds,
        "workspace_bytes": workspace,
        "workspace_bytes_by_formula": 8 * case.chunk * case.vocabulary,
        "gradient_change_with_half_the_chunk": max(distance(a, b) for a, b in zip(found[2:], other[2:], strict=True)),
    }
    if case.reference:
        names = ("logprobs", "entropy", "hidden_gradient", "weight_gradient")
        wanted = reference(hidden.double(), weight.double(), targets, signs.double())
        result["error"] = {n: distance(a, b) for n, a, b in zip(names, found, wanted, strict=True)}
    return result


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All logits of some rows at a time, in float64, by torch's own softmax."""
    head = weight.requires_grad_()
    parts = []
    for rows in torch.arange(len(hidden), device=hidden.device).split(REFERENCE_ROWS):
        leaf = hidden[rows].clone().requires_grad_()
        whole = torch.log_softmax(leaf @ head.T / TEMPERATURE, dim=-1)
        chosen = whole.gather(1, targets[rows, None])[:, 0]
        (chosen * signs[rows]).sum().backward()
        assert leaf.grad is not None
        parts.append((chosen.detach(), -(whole.exp() * whole).sum(-1).detach(), leaf.grad))
    logprobs, entropy, gradient = (torch.cat(column) for column in zip(*parts, strict=True))
    assert head.grad is not None
    return logprobs, entropy, gradient, head.grad


def distance(found: Tensor, wanted: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


class WatchedMemory:
    """The most bytes that torch's allocator had given out above those before, while it is open."""

    def __init__(self, device: torch.device) -> None:
        self.peak, self._device, self._before = 0, device, 0
        # Pages of the process would count what malloc keeps, which differs from run to run.
        self._profile = torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> WatchedMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated() - self._before
            return
        self._profile.__exit__(*error)
        result = self._profile.profiler and self._profile.profiler.kineto_results
        assert result is not None
        events: list[Any] = [it for it in result.events() if it.name() == "[memory]"]
        changes = sorted((it.start_ns(), it.nbytes()) for it in events)
        self.peak = max(accumulate(size for _, size in changes), default=0)


def start_alone() -> None:
    """A world of one rank."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def broken_bounds(result: dict[str, Any]) -> list[str]:
    """What a result does not hold."""
    said = []
    if result["vocabulary"] == 151_936 and result["workspace_bytes"] > WORKSPACE_BOUND:
        said.append(f"workspace {result['workspace_bytes'] / 1e9:.2f} GB above {WORKSPACE_BOUND / 1e9} GB")
    if result["dtype"] == "float32" and result["gradient_change_with_half_the_chunk"] > STABILITY_BOUND:
        said.append(f"gradient moves by {result['gradient_change_with_half_the_chunk']:.1e} with the chunk")
    return said


def main() -> int:
    """Every case in a process of its own; a table, or JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        print(json.dumps(run_case(Case(**json.loads(chosen.case)))))
        return 0
    results = []
    for case in GPU_CASES if torch.cuda.is_available() else HOST_CASES:
        command = [sys.executable, "-W", "ignore", __file__, "--case", json.dumps(asdict(case))]
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode:
            print(said.stderr[-3000:], file=sys.stderr)
            return 1
        results.append(json.loads(said.stdout.splitlines()[-1]))
        if not chosen.json:
            print(describe(results[-1]), flush=True)
    if chosen.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "host, 1 thread"
        print(json.dumps({"device": device, "cases": results}, indent=1))
    return int(any(broken_bounds(result) for result in results))


def describe(result: dict[str, Any]) -> str:
    """One line a case."""
    error = ", ".join(f"{name} {value:.1e}" for name, value in result.get("error", {}).items()) or "not compared"
    return (
        f"T {result['tokens']:>6}  H {result['hidden']:>4}  V {result['vocabulary']:>6}  chunk {result['chunk']:>4}  "
        f"{result['operations_over_2THV']:.2f} x 2THV operations  {result['workspace_bytes'] / 1e6:.0f} MB workspace "
        f"(formula {result['workspace_bytes_by_formula'] / 1e6:.0f})  {result['seconds']:.1f} s  "
        f"half chunk {result['gradient_change_with_half_the_chunk']:.1e}  error: {error}"
        + "".join(f"  BROKEN: {said}" for said in broken_bounds(result))
    )


if __name__ == "__main__":
    sys.exit(main())
