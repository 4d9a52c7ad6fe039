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
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_rates import measure_rates, milliseconds

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
    rates.set_defaults(measure=lambda _: measure_rates(), name="rates")
    chosen = parser.parse_args()
    # The policy replaces what megatron lacks on a CPU before megatron is imported.
    found = chosen.measure(chosen)
    print(json.dumps({"measured": chosen.name, "hardware": hardware(), **found}))


if __name__ == "__main__":
    main()
