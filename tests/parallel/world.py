"""Start a gloo world once and let it run many cases: `run_world(worker, size, cases)`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gspo_megatron.roles import free_ports

ROOT = Path(__file__).parents[2]


def run_world(worker: str, size: int, cases: Any, directory: Path, timeout: float = 600) -> None:
    """Run `python tests/parallel/WORKER directory` on `size` ranks; fails with the first rank's output that failed.

    Args:
        worker: file name in this folder; it reads `directory`/cases.json and writes its results there.
    """
    (directory / "cases.json").write_text(json.dumps(cases))
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    ranks = []
    for rank in range(size):
        environment = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)}
        log = (directory / f"rank-{rank}.log").open("w")
        command = [sys.executable, str(ROOT / "tests" / "parallel" / worker), str(directory)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT))
    try:
        for process in ranks:
            process.wait(timeout)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for rank, process in enumerate(ranks):
        said = (directory / f"rank-{rank}.log").read_text()[-3000:]
        assert process.returncode == 0, f"rank {rank} of {worker} ended with {process.returncode}:\n{said}"
