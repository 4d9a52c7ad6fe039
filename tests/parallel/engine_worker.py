"""One rank of the parity runs on Transformer Engine's layers: `parity_worker.py` behind `engine_answers.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.policy import mesh, weights
from tests.parallel import engine_answers, engine_ring, faults, parity_worker


def main() -> None:
    """Run every case of cases.json in one world, in float32."""
    directory = Path(sys.argv[1])
    weights.SHARD_BYTES = parity_worker.SHARD_BYTES
    device = mesh.start_world()
    engine_answers.install()
    engine_ring.install()
    results: list[dict[str, Any]] = []
    for case in json.loads((directory / "cases.json").read_text()):
        engine_answers.calls.clear()
        with faults.planted(case["fault"]):
            found = parity_worker.run_case(case, "float32", directory, device)
        results.append(found | {"asked": dict(engine_answers.calls)})
        if dist.get_rank() == 0:
            (directory / "results.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
