"""Becomes one process of the run: `srun ... python -m launch.lib.task ATTEMPT KIND`.

Reads its line of the attempt's plan by node and local number, because SLURM orders nodes as it likes. The job's key
comes from a file that only the user can read, so that it is in no command line and in no record of SLURM's.

Servers are run, not become: vLLM ends with code 0 when its engine has died, which would be no fault to srun. One of
several that is lost is started again, as on one machine (`may_restart` of `gspo_megatron/cluster/supervisor.py`): its
neighbours serve its requests meanwhile, and with the next weights it serves again. Every other end ends the attempt.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from gspo_megatron.cluster.end_words import restart_sentence
from gspo_megatron.cluster.free_ports import hold_ports
from gspo_megatron.cluster.scratch_directory import scratch_directory
from gspo_megatron.cluster.server_health import ServerHealth
from gspo_megatron.cluster.shared_files import read_shared
from gspo_megatron.cluster.stop_signals import hold_back
from gspo_megatron.cluster.supervisor import may_restart
from gspo_megatron.cluster.visible_devices import VARIABLE, list_gpus, name_devices
from gspo_megatron.run_dir import AttemptDir
from launch.lib.probe_health import raise_limits

LOOK_SECONDS = 0.5
"""How often a server is looked at."""


def main() -> None:
    """Replace this process by the role, or run it."""
    # The line that this program prints shows the job script that it may send USR1.
    hold_back()
    raise_limits()
    attempt, kind = AttemptDir(Path(sys.argv[1])), sys.argv[2]
    node, local = os.environ["SLURMD_NODENAME"], int(os.environ["SLURM_LOCALID"])
    plan = json.loads(read_shared(attempt.plan))
    mine = [task for task in plan["tasks"] if (task["kind"], task["host"], task["local"]) == (kind, node, local)]
    if not mine:
        raise SystemExit(f"{attempt.plan} has no {kind} number {local} on {node}; start it through launch/gspo_moe.sh")
    address = dict(plan["hosts"])[node]
    settings = dict(mine[0]["environment"])
    if VARIABLE in settings:
        # SLURM that does not constrain devices shows the granted ones by this variable only.
        settings[VARIABLE] = name_devices(settings[VARIABLE], list_gpus())
    os.environ.update(settings)
    os.environ["GSPO_ATTEMPT"] = str(plan["attempt"])
    os.environ["GSPO_JOB_KEY"] = read_shared(attempt.key).strip()
    os.environ["GSPO_JOB_ADDRESSES"] = ",".join(sorted({address for _, address in plan["hosts"]}))
    # Otherwise vLLM asks the routing table, which names another network where there are several.
    os.environ["VLLM_HOST_IP"] = address
    print(f"{mine[0]['name']} on {node} ({address}), process {os.getpid()}", flush=True)
    command = [sys.executable, *mine[0]["arguments"]]
    if kind == "rollout":
        with hold_ports(address, mine[0]["ports"]):
            keep(command, mine[0], address)
    os.execv(sys.executable, command)


def keep(command: Sequence[str], task: dict[str, Any], address: str) -> NoReturn:
    """Run a server; end badly once it was lost too often, or has ended without ever having served."""
    with scratch_directory() as scratch:
        environment = {**os.environ, **scratch}
        left = task["restarts"]
        while True:
            child = subprocess.Popen(command, env=environment)
            # A part of a server that spans nodes cannot come back alone, and has no port of its own.
            health = ServerHealth(address, task["ports"][0]) if left else None
            while child.poll() is None:
                if health:
                    health.look()
                time.sleep(LOOK_SECONDS)
            if not may_restart(left, health is not None and health.served):
                break
            left -= 1
            print(f"gspo: {restart_sentence(task['name'], left)}", flush=True)
    end_as(child.returncode, task["name"])


def end_as(code: int, name: str) -> NoReturn:
    """End as a server has ended, so that srun says of this process what happened to that one."""
    if code < 0:
        faulthandler.disable()  # the stack would be this program's
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    if not code:
        print(f"{name} ended without being asked to; its engine's last words are above", flush=True)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
