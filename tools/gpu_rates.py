"""Rates of one GPU that the planner assumes: products, grouped expert products, attention, copies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def milliseconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Median time of a piece of work on the device."""
    times = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def measure_rates() -> dict[str, Any]:
    """FLOP/s of matrix products, of grouped expert products and of attention; bytes/s of copies."""
    on_gpu = torch.cuda.is_available()
    device, report = ("cuda" if on_gpu else "cpu"), {"dry": not on_gpu}
    scale = 1 if on_gpu else 64
    rows: list[dict[str, Any]] = []
    for m, n, k in ((8192, 8192, 8192), (32768, 4096, 2048), (32768, 2048, 4096), (1024, 151936, 2048)):
        m, n, k = m // scale, n // scale, k // scale
        a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=device, dtype=torch.bfloat16)
        ms = milliseconds(lambda a=a, b=b: a @ b, 10)
        rows.append({"kind": "matmul", "m": m, "n": n, "k": k, "ms": ms, "tflops": 2 * m * n * k / ms / 1e9})
    if on_gpu:
        rows += grouped_rates() + attention_rates() + copy_rates()
    return {**report, "rows": rows}


def guarded(work: Callable[[], dict[str, Any]], **what: Any) -> dict[str, Any]:
    """A row, or the sentence of why there is none."""
    try:
        return {**what, **work()}
    except Exception as error:  # a kernel that refuses a shape must not cost the other rows
        return {**what, "error": f"{type(error).__name__}: {error}"[:300]}


def grouped_rates() -> list[dict[str, Any]]:
    """The experts of Qwen3-30B-A3B: 128 experts, gate and up in one product, forward and backward."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    def one(experts: int, each: int, wide: int, narrow: int) -> dict[str, Any]:
        layer = te.GroupedLinear(experts, wide, narrow, bias=False, params_dtype=torch.bfloat16, device="cuda")
        x = torch.randn(experts * each, wide, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        sizes = [each] * experts
        ms = milliseconds(lambda: layer(x, sizes))
        both = milliseconds(lambda: layer(x, sizes).sum().backward())
        flops = 2 * experts * each * wide * narrow
        return {"ms": ms, "tflops": flops / ms / 1e9, "both_ms": both, "both_tflops": 3 * flops / both / 1e9}

    shapes = [(128, each) for each in (64, 256, 1024, 4096)] + [(16, 2048), (16, 8192)]
    return [
        guarded(lambda e=experts, t=each: one(e, t, 2048, 1536), kind="grouped", experts=experts, tokens_each=each)
        for experts, each in shapes
    ]


def attention_rates() -> list[dict[str, Any]]:
    """Attention of 30B-A3B (32 query heads, 4 groups of 128), packed, forward and backward."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    def one(length: int, count: int) -> dict[str, Any]:
        layer = te.DotProductAttention(32, 128, num_gqa_groups=4, qkv_format="thd", attn_mask_type="padding_causal")
        total = length * count
        ends = torch.arange(0, total + 1, length, device="cuda", dtype=torch.int32)
        q, k, v = (
            torch.randn(total, heads, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (32, 4, 4)
        )

        def forward() -> torch.Tensor:
            return layer(q, k, v, cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=length, max_seqlen_kv=length)

        ms, both = milliseconds(forward, 3), milliseconds(lambda: forward().sum().backward(), 3)
        flops = 2 * 2 * 32 * 128 * count * length * length / 2
        return {"ms": ms, "tflops": flops / ms / 1e9, "both_ms": both, "both_tflops": 3.5 * flops / both / 1e9}

    shapes = ((2048, 16), (8192, 4), (32768, 1), (102400, 1))
    return [guarded(lambda n=n, c=c: one(n, c), kind="attention", length=n, count=c) for n, c in shapes]


def copy_rates() -> list[dict[str, Any]]:
    """Bytes/s within the device and between device and pinned host memory."""
    size = 1 << 30
    here, there = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    rows = []
    for name, work, moved in (
        ("device", lambda: there.copy_(here), 2 * size),
        ("to host", lambda: host.copy_(here, non_blocking=True), size),
        ("from host", lambda: here.copy_(host, non_blocking=True), size),
    ):
        rows.append({"kind": "copy", "name": name, "gb_per_second": moved / milliseconds(work) / 1e6})
    return rows
