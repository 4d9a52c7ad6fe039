"""Start a gloo world once and let it run many cases: `run_world(worker, size, cases)`.

One process imports torch and megatron, then forks the ranks: eight ranks start in the time of one.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.free_ports import free_ports
from tests.places import ROOT

GRACE = 10.0
"""Seconds that the other ranks get after the first one failed."""


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
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.parallel.world", worker, str(size), str(directory), str(timeout)]
    said = subprocess.run(command, env={**os.environ, **place}, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-5000:]


def share_groups() -> None:
    """Let every process group of the same ranks be one, for as long as the process lives.

    Building one layout after another leaks some fifty threads each otherwise: megatron drops its groups without
    destroying them, and every gloo thread wakes up a hundred times a second.
    """
    import torch.distributed as dist

    make, destroy = dist.new_group, dist.destroy_process_group
    kept: dict[tuple[int, ...] | None, Any] = {}

    def new_group(ranks: Any = None, *_: Any, **__: Any) -> Any:
        key = None if ranks is None else tuple(ranks)
        if key not in kept:
            kept[key] = make(ranks)
        return kept[key]

    def destroy_process_group(group: Any = None) -> None:
        if group is None:
            kept.clear()
            destroy()

    dist.new_group, dist.destroy_process_group = new_group, destroy_process_group


def _run_ranks(worker: str, size: int, directory: Path, timeout: float) -> None:
    """Fork the ranks and wait for them; the process ends with 1 and a rank's last words when one failed."""
    import torch

    import gspo_megatron.policy.policy  # noqa: F401  imported once, for all ranks

    torch.set_num_threads(1)
    share_groups()
    ranks = {_fork_rank(worker, rank, directory): rank for rank in range(size)}
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < size and time.monotonic() < end:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            time.sleep(0.05)
            continue
        codes[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
        if codes and any(codes.values()):
            end = min(end, time.monotonic() + GRACE)
    for pid in ranks:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    failed = [rank for rank, code in codes.items() if code] or sorted(ranks.values())
    if failed:
        rank = failed[0]
        words = (directory / f"rank-{rank}.log").read_text()[-3000:]
        print(f"rank {rank} of {worker} ended with {codes.get(rank, 'no answer in time')}:\n{words}", file=sys.stderr)
        sys.exit(1)


def _fork_rank(worker: str, rank: int, directory: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    log = os.open(directory / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [worker, str(directory)]
    code = 1
    try:
        runpy.run_path(str(ROOT / "tests" / "parallel" / worker), run_name="__main__")
        code = 0
    except BaseException:  # a fork must never fall back into the code of the process that made it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _run_ranks(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
