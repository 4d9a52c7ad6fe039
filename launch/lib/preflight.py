"""What must be true of the nodes before a role starts; pure functions of the reports that `probe.py` wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gspo_megatron.config import Recipe
from gspo_megatron.models.hf_table import count_parameters

GIB = 1 << 30
MAX_CLOCK_SECONDS = 5.0
"""Clocks further apart than this make logs and file times misleading, and let certificates and leases fail."""
MIN_SCRATCH = GIB
"""Free bytes of /tmp and /dev/shm: compile caches, NCCL's and vLLM's shared memory."""
MAX_USED_MEMORY_MIB = 2048
"""GPU memory in use before the job starts: more than a driver and its daemons take."""
BYTES_PER_PARAMETER = 14
"""Of a checkpoint: bf16 weight, fp32 master, two fp32 moments."""
CHECKPOINTS = 3
"""Two are kept while a third is written."""

TMPDIR_ROOM = "clean it, or set TMPDIR (site file)"
ROOM = {"/dev/shm": "mount it larger (of a container: --shm-size), or end what fills it; TMPDIR does not replace it"}
"""What to do about a full place."""

Report = Mapping[str, Any]


def judge(reports: Sequence[Report], nodes: Sequence[str], gpus: int, recipe: Recipe) -> list[str]:
    """One sentence a fault, each naming its node and the fix; empty when the roles may start."""
    seen = {report["host"] for report in reports}
    silent = [
        f"{node}: it left no report in the run directory; mount the directory there, or give another run.directory"
        for node in nodes
        if node not in seen
    ]
    sick = [f"{node}: {reason}; {without(node)}, and tell your administrators" for node, reason in find_sick(reports)]
    return [*silent, *sick, *_each(reports, gpus, recipe), *_together(reports)]


def find_sick(reports: Sequence[Report]) -> list[tuple[str, str]]:
    """Nodes whose hardware must not be used, with the reason. The job is queued again without them."""
    found = []
    for report in reports:
        for gpu, health in report["gpu_health"].items():
            if health["uncorrected"].isdigit() and int(health["uncorrected"]):
                found.append((report["host"], f"{gpu} has {health['uncorrected']} uncorrected memory errors"))
            if "Yes" in (health["remap_failed"], health["remap_pending"]):
                found.append((report["host"], f"{gpu} has memory rows to remap and must be reset"))
        if report["dcgm"] == "Failure":
            found.append((report["host"], "dcgmi health reports a failure"))
    return list({node: (node, reason) for node, reason in reversed(found)}.values())


def warnings(reports: Sequence[Report]) -> list[str]:
    """What does not stop a run, but explains a slow or failing one."""
    said = []
    for report in reports:
        node, slow = (
            report["host"],
            [gpu for gpu, has in report["gpu_health"].items() if has["persistence"] == "Disabled"],
        )
        said += [f"{node}: {warning}" for warning in report["warnings"]]
        said += [f"{node}: port {port}, which is not active" for port in report["adapters"] if "ACTIVE" not in port]
        said += [
            f"{node}: the kernel's log has Xid {number} of GPU {bus}" for bus, number in map(str.split, report["xids"])
        ]
        if slow:
            said.append(
                f"{node}: {len(slow)} GPUs without persistence mode start slowly; nvidia-persistenced keeps them"
            )
        if report["dcgm"] == "Warning":
            said.append(f"{node}: dcgmi health reports a warning")
    return list(dict.fromkeys(said))


def _each(reports: Sequence[Report], gpus: int, recipe: Recipe) -> Iterator[str]:
    """Faults of single nodes."""
    for report in reports:
        node = report["host"]
        yield from (f"{node}: {fault}" for fault in report["faults"])
        for port in report["used_ports"]:
            yield f"{node}: port {port} is taken by another program; end it (ss -tlnp shows it), or {without(node)}"
        for place, free in report["free_bytes"].items():
            if free < MIN_SCRATCH:
                yield f"{node}: {place} has {free / GIB:.2f} GiB free, 1 is needed; {ROOM.get(place, TMPDIR_ROOM)}"
        need = BYTES_PER_PARAMETER * CHECKPOINTS * count_parameters(recipe.arch)
        if report["run_dir_free_bytes"] < need:
            yield (
                f"{node}: the run directory has {report['run_dir_free_bytes'] / GIB:.1f} GiB free, "
                f"{CHECKPOINTS} checkpoints take {need / GIB:.1f}; free some, or give another run.directory"
            )
        offset = report["clock_offset"] or 0.0
        if abs(offset) > MAX_CLOCK_SECONDS:
            yield f"{node}: its clock is off by {offset:+.1f} s; start its time service, or {without(node)}"
        if gpus and len(report["gpus"]) < gpus:
            yield (
                f"{node}: nvidia-smi lists {len(report['gpus'])} GPUs where SLURM granted {gpus}; "
                f"drain the node and {without(node)}"
            )
        kinds = sorted({gpu["name"] for gpu in report["gpus"]})
        if len(kinds) > 1:
            yield f"{node}: it has GPUs of {len(kinds)} kinds, {' and '.join(kinds)}; {without(node)}"
        for index, gpu in enumerate(report["gpus"]):
            if (gpu["used_mib"] or 0) > MAX_USED_MEMORY_MIB:
                yield (
                    f"{node}: {gpu['used_mib']} MiB of GPU {index} are in use before the job starts; "
                    f"end what an earlier job left there, or {without(node)}"
                )


def _together(reports: Sequence[Report]) -> Iterator[str]:
    """Nodes that differ from the others: the fewer are named."""
    for kind in sorted({report["kind"] for report in reports}):
        group = [report for report in reports if report["kind"] == kind]
        for name in sorted({name for report in group for name in report["versions"]}):
            versions = {report["host"]: report["versions"].get(name, "absent") for report in group}
            yield from _odd(f"{name} of the {kind}", versions)
    for key, what in (("name", "GPU"), ("driver", "GPU driver")):
        kinds = {report["host"]: " and ".join(sorted({gpu[key] for gpu in report["gpus"]})) for report in reports}
        yield from _odd(what, {host: kind or "none" for host, kind in kinds.items()})
    ports = {report["host"]: str(sum("ACTIVE" in port for port in report["adapters"])) for report in reports}
    yield from _odd("number of active network ports", ports)
    yield from _odd("commit of the checkout", {report["host"]: report["commit"] for report in reports})


def _odd(what: str, values: Mapping[str, str]) -> Iterator[str]:
    """Hosts whose value is not the one that most have."""
    common = max(values.values(), key=Counter(values.values()).__getitem__, default="")
    for node, its in values.items():
        if its != common:
            yield f"{node}: {what} is {its}, {common} elsewhere; make the nodes alike, or {without(node)}"


def without(node: str) -> str:
    """The fix that always works."""
    return f"leave the node out (sbatch --exclude={node})"
