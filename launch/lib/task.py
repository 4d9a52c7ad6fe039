"""Becomes one process of the run: `srun ... python -m launch.lib.task ATTEMPT KIND`.

Reads its line of the attempt's plan by node and local number, because SLURM orders nodes as it likes. The job's key
comes from a file that only the user can read, so that it is in no command line and in no record of SLURM's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


def main() -> None:
    """Replace this process by the role."""
    # Held back through the role's own start: it hears of the time limit when it has a handler. The line that this
    # program prints tells the script that it may send.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    attempt, kind = Path(sys.argv[1]), sys.argv[2]
    node, local = os.environ["SLURMD_NODENAME"], int(os.environ["SLURM_LOCALID"])
    plan = json.loads((attempt / "plan.json").read_text())
    mine = [task for task in plan["tasks"] if (task["kind"], task["host"], task["local"]) == (kind, node, local)]
    if not mine:
        where = attempt / "plan.json"
        raise SystemExit(f"{where} has no {kind} number {local} on {node}; start it through launch/gspo_moe.sh")
    address = dict(plan["hosts"])[node]
    os.environ.update(mine[0]["environment"])
    os.environ["GSPO_ATTEMPT"] = str(plan["attempt"])
    os.environ["GSPO_JOB_KEY"] = (attempt / "key").read_text().strip()
    os.environ["GSPO_JOB_ADDRESSES"] = ",".join(sorted({address for _, address in plan["hosts"]}))
    # Otherwise vLLM asks the routing table, which names another network where there are several.
    os.environ["VLLM_HOST_IP"] = address
    print(f"{mine[0]['name']} on {node} ({address}), process {os.getpid()}", flush=True)
    os.execv(sys.executable, [sys.executable, *mine[0]["arguments"]])


if __name__ == "__main__":
    main()
