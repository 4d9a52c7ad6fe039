"""Measure the policy on one GPU: training steps of a slice of Qwen3-30B-A3B, and the rates that the planner assumes.

    python tools/measure_gpu.py step --layers 2 --tokens 102400 --sequences 1    one line of JSON
    python tools/measure_gpu.py rates                                            one line of JSON

The slice has the true sizes and fewer layers. Without a GPU the sizes shrink, and the result says so: it then shows
only that the command runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RECIPE = Path("recipes/qwen3_30b_a3b_gspo_100k.yaml")
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 128, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def hardware() -> dict[str, Any]:
    """What ran, and which versions."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "gpu": None}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for name in ("transformer_engine", "megatron.core"):
        try:
            found[name] = getattr(__import__(name, fromlist=["__version__"]), "__version__", "?")
        except (ImportError, OSError) as error:
            found[name] = f"missing: {error}"
    return found


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


def make_policy(layers: int, tokens: int, recompute: str) -> Any:
    """A policy of the slice with random weights, in a world of one rank."""
    from gspo_megatron.cluster.free_ports import free_ports
    from gspo_megatron.models import load_recipe
    from gspo_megatron.policy import mesh
    from gspo_megatron.policy.policy import OptimizerSettings, Policy

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place, MASTER_PORT=str(free_ports(1)[0]))
    device = mesh.start_world()
    shape = {"num_hidden_layers": layers, **({} if torch.cuda.is_available() else SMALL)}
    overrides = [f"model.architecture.{key}={value}" for key, value in shape.items()]
    overrides += ["model.path=null", "placement.nodes=1", "placement.gpus_per_node=1", "rollout.servers=1"]
    overrides += ["rollout.tensor_parallel=1", "trainer.context_parallel=1", "trainer.expert_parallel=1"]
    overrides += [
        f"trainer.micro_batch_tokens={tokens}",
        f"trainer.recompute={recompute}",
        "rollout.max_prompt_tokens=1",
    ]
    overrides += [f"rollout.max_answer_tokens={tokens - 1}", "tokenizer.path=/nowhere"]
    recipe = load_recipe(RECIPE, overrides)
    # Megatron clips the gradients of bfloat16 weights on a GPU only.
    policy = Policy(recipe, device, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    draw = torch.Generator(device=device).manual_seed(0)
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            with torch.no_grad():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.02, generator=draw)
                else:
                    parameter.fill_(1.0)
    policy.start_optimizer(OptimizerSettings(1e-6, (0.9, 0.95), 1e-8, 0.0, 1.0))
    return policy


def make_batches(policy: Any, tokens: int, sequences: int) -> Any:
    """One packed micro-batch of equal sequences."""
    import numpy as np

    from gspo_megatron.data.packing import collate
    from gspo_megatron.types import Sample, SampleRef

    draw, length = np.random.default_rng(0), tokens // sequences
    samples = []
    for index in range(sequences):
        ids = draw.integers(0, policy.weights.arch.vocab_size, length).astype(np.int32)
        ref = SampleRef("", index, 0, 1, length - 1, 0.0, "stop", ())
        samples.append(Sample(ids, np.arange(length) > 0, np.zeros(length, np.float32), ref))
    return policy.place([collate(samples)])


def gspo_loss(batch: Any, scored: Any, old: torch.Tensor) -> Any:
    """The loss of the main recipe on this micro-batch."""
    from gspo_megatron.objective import BatchTotals, LossInputs, ObjectiveSpec, policy_loss

    sequences = len(batch.cu_seqlens) - 1
    advantages = torch.where(torch.arange(sequences, device=old.device) % 2 == 0, 1.0, -1.0)
    inputs = LossInputs(
        logprobs=scored.logprobs, old_logprobs=old, rollout_logprobs=None, reference_logprobs=None,
        advantages=advantages, loss_mask=batch.loss_mask, cu_seqlens=batch.cu_seqlens,
        totals=BatchTotals(sequences, len(old)), token_advantages=False,
    )  # fmt: skip
    out = policy_loss(ObjectiveSpec.preset("gspo"), inputs)
    return out.loss, out.metrics


def measure_step(chosen: argparse.Namespace) -> dict[str, Any]:
    """Old log-probs and one update: seconds, peak memory beside the plan's, host synchronisations, kernels."""
    on_gpu = torch.cuda.is_available()
    tokens = chosen.tokens if on_gpu else 1024
    policy = make_policy(chosen.layers, tokens, chosen.recompute)
    batches = make_batches(policy, tokens, chosen.sequences)
    static = torch.cuda.memory_allocated() if on_gpu else 0
    olds: list[torch.Tensor] = []

    def score() -> None:
        olds[:] = [policy.score(batches)[0].logprobs]

    def train() -> Any:
        return policy.train(batches, lambda batch, now, _: gspo_loss(batch, now, olds[0]), 1e-6)

    report: dict[str, Any] = {"layers": chosen.layers, "tokens": tokens, "sequences": chosen.sequences}
    report |= {"recompute": chosen.recompute, "dry": not on_gpu}
    score()
    _, norm, taken = train()
    report |= {"gradient_norm": float(norm), "taken": bool(taken), "static_bytes": static}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    report["score_ms"] = milliseconds(score, 3)
    report["score_peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    report["train_ms"] = milliseconds(train, 3)
    if on_gpu:
        report["train_peak_bytes"] = torch.cuda.max_memory_allocated()
        report["train_reserved_bytes"] = torch.cuda.max_memory_reserved()
        report["outside_allocator_bytes"] = outside_allocator()
    report["plan"] = planned(policy.recipe)
    report["synchronisations"] = {"score": synchronisations(score), "train": synchronisations(train)}
    report["kernels"] = {"score": kernels(score), "train": kernels(train)}
    if on_gpu:
        began, total = time.perf_counter(), 0
        for _, tensor in policy.export():
            total += tensor.nbytes
        torch.cuda.synchronize()
        report["export"] = {"bytes": total, "seconds": time.perf_counter() - began}
    return report


def outside_allocator() -> int:
    """Bytes of the device that torch's allocator does not hold: context, libraries, communicators."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def planned(recipe: Any) -> dict[str, Any]:
    """What `gspo plan` says of the same slice."""
    from gspo_megatron.plan import make_plan

    plan = make_plan(recipe, nodes=1, gpu="h100")
    if plan.memory is None or plan.compute is None:
        return {"refused": [str(finding) for finding in plan.findings if finding.severity == "error"]}
    (stage,) = plan.memory
    return {
        "peak_bytes": stage.peak_bytes,
        "static_bytes": stage.static_bytes,
        "parts": {**stage.exact, **stage.estimated},
        "linear_flops_per_token": plan.compute.linear_flops_per_token,
        "quadratic_flops_per_token": plan.compute.quadratic_flops_per_token,
    }


def synchronisations(work: Callable[[], Any]) -> dict[str, int]:
    """Places where the host waits for the device, with how often."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    counts: dict[str, int] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}"
            counts[place] = counts.get(place, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def kernels(work: Callable[[], Any], top: int = 25) -> list[dict[str, Any]]:
    """The kernels that take longest, of one run."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CUDA] if torch.cuda.is_available() else [ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    rows = [
        {
            "name": row.key[:90],
            "ms": round((row.self_device_time_total or row.self_cpu_time_total) / 1e3, 3),
            "count": row.count,
        }
        for row in found.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:top]


def measure_rates(_: argparse.Namespace) -> dict[str, Any]:
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


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    step = kinds.add_parser("step", help="old log-probs and one update of a slice")
    step.add_argument("--layers", type=int, default=2)
    step.add_argument("--tokens", type=int, default=32768)
    step.add_argument("--sequences", type=int, default=1)
    step.add_argument("--recompute", default="full", choices=("none", "selective", "full"))
    step.set_defaults(measure=measure_step, name="step")
    rates = kinds.add_parser("rates", help="products, attention and copies")
    rates.set_defaults(measure=measure_rates, name="rates")
    chosen = parser.parse_args()
    # The policy replaces what megatron lacks on a CPU before megatron is imported.
    found = chosen.measure(chosen)
    print(json.dumps({"measured": chosen.name, "hardware": hardware(), **found}))


if __name__ == "__main__":
    main()
