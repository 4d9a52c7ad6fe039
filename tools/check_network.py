"""Run a small all-reduce over the nodes of a job, one GPU each: `srun ... python tools/check_network.py PLAN.json`.

The launcher runs it before the roles start. It prints the bus bandwidth and exits with 1 if the sum is wrong.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

MIB = 256
ROUNDS = 10
TIMEOUT = timedelta(seconds=120)


def main() -> int:
    """Run the all-reduce. The ranks are the tasks of the srun step."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    place = next(task["environment"] for task in plan["tasks"] if task["kind"] == "trainer")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    where = f"tcp://{place['MASTER_ADDR']}:{place['MASTER_PORT']}"
    dist.init_process_group("nccl", init_method=where, rank=rank, world_size=world, timeout=TIMEOUT, device_id=device)
    values = torch.ones(MIB << 18, device=device)
    dist.all_reduce(values)
    correct = bool((values == world).all())
    torch.cuda.synchronize()
    began = time.monotonic()
    for _ in range(ROUNDS):
        dist.all_reduce(values)
    torch.cuda.synchronize()
    seconds = (time.monotonic() - began) / ROUNDS
    if rank == 0:
        bus = 2 * (world - 1) / world * (MIB << 20) / seconds / 1e9
        print(f"all-reduce of {MIB} MiB over {world} nodes: {1e3 * seconds:.1f} ms, bus {bus:.1f} GB/s", flush=True)
    if not correct:
        print(f"{os.environ['SLURMD_NODENAME']}: the sum over {world} nodes is wrong", file=sys.stderr)
    dist.destroy_process_group()
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
