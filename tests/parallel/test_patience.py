"""Ranks wait for a rollout batch for longer than any collective may take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from gspo_megatron.policy import mesh

store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=int(sys.argv[1]), world_size=2, timeout=timedelta(seconds=2))
group = mesh.patient_group()
heard = [None]
if dist.get_rank() == 0:
    time.sleep(5)
    heard = ["a batch that took its time"]
dist.broadcast_object_list(heard, src=0, group=group)
print(heard[0])
"""


def test_a_long_rollout_does_not_end_the_ranks_that_wait_for_it(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-Wignore", "-c", PROGRAM, str(rank), str(tmp_path / "store")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [text.strip().splitlines()[-1] for text in said] == ["a batch that took its time"] * 2, said
