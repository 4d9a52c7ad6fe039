"""Every constant of the time estimates, in one table: value, range, unit, source and date.

`tools/plan_table.py` holds the estimates against published runs. It fits those marked `fitted` and prints what each fit
predicts for the run that it left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

SLICE = "H100 80GB HBM3, tools/results/h100_slice.json"
TABLE = "fitted to tools/published_runs.yaml"


def _constant(
    value: float, low: float, high: float, unit: str, source: str, date: str = "2026-11-26", fitted: bool = False
) -> Any:
    metadata = {"low": low, "high": high, "unit": unit, "source": source, "date": date, "fitted": fitted}
    return field(default=value, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates and overheads of a GPU, a network and a server."""

    product_share: float = _constant(0.75, 0.74, 0.79, "of peak FLOP/s", SLICE)
    """Large matrix products in bfloat16: 737 to 782 TFLOP/s."""
    expert_floor: float = _constant(17e-6, 14e-6, 22e-6, "s", SLICE)
    """Least time of one expert's product within a grouped one."""
    copy_share: float = _constant(0.88, 0.85, 0.92, "of memory bandwidth", SLICE)
    """A copy on the device: 2,957 GB/s."""
    element_share: float = _constant(0.88, 0.4, 0.88, "of memory bandwidth", TABLE, "2026-11-30", fitted=True)
    """Norms, rotation, activation functions, and the sorting of tokens by expert."""
    layer_seconds: float = _constant(0.65e-3, 0.1e-3, 1.6e-3, "s", TABLE, "2026-11-30", fitted=True)
    """Time of a layer's forward pass over one micro-batch that depends on no size: launches, waiting for counts."""
    link_share: float = _constant(0.7, 0.6, 0.8, "of a node's link", "usual for NCCL", "2026-11-21")
    """All-gather, reduce-scatter and all-to-all inside a node."""
    network_share: float = _constant(0.9, 0.5, 0.9, "of the network", TABLE, "2026-11-30", fitted=True)
    """The same between nodes. DeepEP's kernels have 45 of a port's 50 GB/s."""
    hidden_share: float = _constant(0.735, 0.3, 1.0, "of the exchange", TABLE, "2026-11-30", fitted=True)
    """What overlapped dispatch hides of the experts' exchange behind the products. With nothing else changed: a third
    (235B, 19.7 to 17.6 s a step, 2025) to four fifths (30B, 244 to 287 TFLOP/s, 2026)."""
    expert_imbalance: float = _constant(1.71, 1.0, 2.2, "of the mean", TABLE, "2026-11-30", fitted=True)
    """Work of the fullest expert rank where the router is not forced to be even."""
    slot_imbalance: float = _constant(1.1, 1.0, 1.34, "of the mean", "tools/results/bench_packing.json", "2026-11-21")
    """Work of the fullest rank, mean over the micro-batches of an update."""
    length_spread: float = _constant(1.5, 1.2, 2.2, "of the square of the mean", "long-tailed responses", "2026-11-21")
    """Mean of the squared length of a sequence over the square of the mean."""
    tensor_seconds: float = _constant(0.33e-3, 0.2e-3, 0.4e-3, "s", SLICE)
    """Time of an update for each parameter tensor on a rank, where gradients are added up outside the products."""
    host_link: float = _constant(55e9, 50e9, 56e9, "bytes/s", SLICE)
    """Between a GPU and pinned host memory."""
    server_share: float = _constant(0.8, 0.6, 0.9, "of memory bandwidth", "vLLM 30B, TP1, H100: 13.2 ms", "2026-11-30")
    """Weights and KV during decoding."""
    server_product_share: float = _constant(0.3, 0.2, 0.5, "of peak FLOP/s", "assumed", "2026-11-21")
    """Products of large batches, and of prompts."""
    step_seconds: float = _constant(2e-3, 1e-3, 4e-3, "s", "vLLM 30B, TP1, H100: 13.2 ms", "2026-11-30")
    """Least time of a decoding step: launches, sampling, the server's loop."""
    eager_seconds: float = _constant(
        0.26e-3,
        0.2e-3,
        0.8e-3,
        "s",
        "Llama 3.1 8B, H100: 8.4 ms without graphs, cloudai.pt/tag/cuda-graphs",
        "2026-11-30",
    )
    """Host time of a layer whose kernels are launched one by one. Qwen2.5-Omni's 28 layers on A800 take 22 ms (0.8):
    vllm-omni#7960."""
    request_seconds: float = _constant(80e-6, 0.0, 80e-6, "s", TABLE, "2026-11-30", fitted=True)
    """Time of a decoding step for each response in it, on the host."""
    sum_seconds: float = _constant(6e-6, 4e-6, 15e-6, "s", "vLLM's one-shot all-reduce", "2026-11-30")
    """Least time of an all-reduce inside a node, and again 2 us a rank."""
    far_sum_seconds: float = _constant(87.8e-6, 30e-6, 200e-6, "s", TABLE, "2026-11-30", fitted=True)
    """The same over several nodes."""
    turn_seconds: float = _constant(27.7, 0.0, 40.0, "s", TABLE, "2026-11-30", fitted=True)
    """Waking servers, and moving memory between them and the trainer on shared GPUs, beside the bytes themselves."""
    batch_seconds: float = _constant(2.0, 0.5, 10.0, "s", "tiny recipe: last rewards, packing, reading", "2026-11-30")
    """Last rewards of a batch, packing, and the start of the trainer on it."""
    update_share: float = _constant(
        0.3, 0.15, 0.5, "of the network", "published updates take 2 to 6 times the ideal", "2026-11-21"
    )
    """Weight update."""
    dropped_groups: float = _constant(
        0.4, 0.1, 0.7, "of all groups", "zero-variance groups in public GRPO runs", "2026-11-30"
    )
    """Groups without a difference in reward, which dynamic sampling replaces."""


CALIBRATED = Rates()
TIME_RANGE = (0.8, 1.25)
"""Least and most time over the planned one. Source: tools/results/plan_table.md: constants fitted without a run predict
all but one of 25 runs within it. A test holds the table against it."""


def constants() -> list[tuple[str, dict[str, Any]]]:
    """Return name, value and origin of every constant."""
    return [(one.name, {"value": one.default, **one.metadata}) for one in fields(Rates)]
