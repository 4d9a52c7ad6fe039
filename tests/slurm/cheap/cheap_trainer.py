"""A trainer rank of a test: it counts steps, saves empty checkpoints and stops as a real rank does.

A file CRASH in the run directory makes rank 0 fail once; each rank writes what it sees into RUN/seen.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

import yaml

from gspo_megatron.cluster.attempts import newest_checkpoint, refuse_if_replaced
from gspo_megatron.cluster.child_processes import die_with_parent
from gspo_megatron.cluster.exit_codes import OK, STOPPED
from gspo_megatron.cluster.stop_signals import StopSignals
from gspo_megatron.run_dir import RunDir
from tests.checkpoints import write_checkpoint

STEP_SECONDS = 0.2
SEEN = ("RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "SLURMD_NODENAME", "SLURM_MPI_TYPE", "PATH", "GSPO_ATTEMPT")


def main() -> int:
    """Train for `trainer.max_steps` steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--controller", required=True)
    run = RunDir(parser.parse_args().run_dir)
    die_with_parent()
    stop = StopSignals()
    recipe = yaml.safe_load(run.recipe.read_text())
    rank = int(os.environ["RANK"])
    seen = run.path / "seen"
    seen.mkdir(exist_ok=True)
    facts = {name: os.environ.get(name) for name in SEEN}
    facts["files"] = str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    (seen / f"{os.environ['GSPO_ATTEMPT']}-{rank}.json").write_text(json.dumps(facts))
    done, last, every = newest_checkpoint(run.path), recipe["trainer"]["max_steps"], recipe["checkpoint"]["every"]
    if rank:
        while not run.done.exists():
            time.sleep(0.05)
        return OK
    for step in range(done + 1, last + 1):
        time.sleep(STEP_SECONDS)
        crash = run.path / "CRASH"
        if crash.exists():
            crash.unlink()
            print("a file CRASH is there", flush=True)
            return 1
        with run.metrics.open("a") as file:
            file.write(json.dumps({"step": step, "attempt": os.environ["GSPO_ATTEMPT"]}) + "\n")
        if step == last or stop.raised or (every and step % every == 0):
            refuse_if_replaced(run.path)
            write_checkpoint(run.checkpoint(step).path)
        if stop.raised and step < last:
            print(f"stopped after step {step} as asked", flush=True)
            return STOPPED
    run.done.touch()
    return OK


if __name__ == "__main__":
    sys.exit(main())
