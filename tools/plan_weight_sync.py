"""What a weight update of Qwen3-235B-A22B moves: `python tools/plan_weight_sync.py [--json]`.

Plans the update from 256 and 128 trainer ranks to 64 rollout ranks in four layouts, in bfloat16, and sets the bytes
beside what all-gather + broadcast would move. Needs no GPU: it is arithmetic.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import count_parameters, local_parameters
from gspo_megatron.models.vllm_layout import ServerLayout, needed_values
from gspo_megatron.models.weight_format import WeightFormat
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.weights.plan import TransferPlan

RECIPE = Path(__file__).parents[1] / "recipes" / "qwen3_235b_a22b_gspo.yaml"
ITEM_BYTES, BUCKET_BYTES = 2, 64 << 20
# 94 layers over 8 stages: 11, six times 12, 11.
STAGES: dict[str, Any] = {"pipeline": 8, "first_stage_layers": 11, "last_stage_layers": 11}
TRAINERS = {
    "256 ranks, TP4 PP8 CP8 EP32": Layout(256, tensor=4, context=8, expert=32, **STAGES),
    "128 ranks, TP2 PP8 CP8 EP16": Layout(128, tensor=2, context=8, expert=16, **STAGES),
}
SERVERS = {
    "8 x TP8": [ServerLayout(8)] * 8,
    "4 x TP16": [ServerLayout(16)] * 4,
    "4 x (DP4 x TP4, EP16)": [ServerLayout(4, data=4, expert_parallel=True)] * 4,
    "4 x (PP2 x TP8)": [ServerLayout(8, pipeline=2)] * 4,
}


def measure(arch: Architecture, trainer: Layout, servers: list[ServerLayout]) -> dict[str, Any]:
    """One pair of layouts: seconds to plan, what moves, how even, and the same by all-gather + broadcast."""
    wall, cpu = time.perf_counter(), time.process_time()
    plan = TransferPlan(arch, trainer, servers, WeightFormat("bfloat16"), BUCKET_BYTES)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    sent, received = plan.sent_bytes(), plan.received_bytes()
    needed = [needed_values(arch, server, rank) * ITEM_BYTES for server in servers for rank in range(server.world)]
    redundancy = [int(got) / want for got, want in zip(received, needed, strict=True)]
    model = count_parameters(arch) * ITEM_BYTES
    mine, theirs = plan.to_send(0), plan.to_receive(0)
    return {
        "plan_seconds": round(wall, 3),
        "plan_cpu_seconds": round(cpu, 3),
        "received_over_needed": {"least": min(redundancy), "most": max(redundancy)},
        "busiest_sender_over_mean": round(float(sent.max() / sent.mean()), 4),
        "busiest_receiver_over_mean": round(float(received.max() / received.mean()), 4),
        "moved_bytes": int(sent.sum()),
        "bytes_a_worker": round(float(received.mean())),
        "all_gather_bytes": trainer.world * model - held_values(arch, trainer) * ITEM_BYTES,
        "broadcast_bytes": plan.workers * model,
        "broadcast_over_needed": round(plan.workers * model / sum(needed), 2),
        "messages_of_rank_0": len(mine),
        "messages_of_worker_0": len(theirs),
        "mean_message_mib": round(sum(m.num_bytes for m in theirs) / len(theirs) / 2**20, 2),
        "rounds": 1 + theirs[-1].round,
    }


def held_values(arch: Architecture, trainer: Layout) -> int:
    """Values that all trainer ranks hold together; an all-gather brings every rank the rest of the model."""
    return sum(
        math.prod(parameter.shape)
        for rank in range(trainer.world)
        for parameter in local_parameters(arch, trainer, trainer.coordinates(rank))
    )


def main() -> None:
    """Print one row, or one JSON object, for every pair of layouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    arch = load_recipe(RECIPE).arch
    as_json = parser.parse_args().json
    rows = [
        {"trainer": of, "servers": to, **measure(arch, trainer, servers)}
        for of, trainer in TRAINERS.items()
        for to, servers in SERVERS.items()
    ]
    if as_json:
        print(json.dumps({"model": RECIPE.stem, "item_bytes": ITEM_BYTES, "pairs": rows}, indent=1))
        return
    head = ("plan s", "recv/need", "sender", "receiver", "moved TB", "gather+broadcast TB")
    print(f"{'trainer':<29}{'servers':<24}" + "".join(f"{name:>{len(name) + 3}}" for name in head))
    for row in rows:
        baseline = (row["all_gather_bytes"] + row["broadcast_bytes"]) / 1e12
        values = (
            row["plan_seconds"],
            row["received_over_needed"]["most"],
            row["busiest_sender_over_mean"],
            row["busiest_receiver_over_mean"],
            row["moved_bytes"] / 1e12,
            baseline,
        )
        cells = (f"{value:>{len(name) + 3}.3f}" for name, value in zip(head, values, strict=True))
        print(f"{row['trainer']:<29}{row['servers']:<24}" + "".join(cells))


if __name__ == "__main__":
    main()
