"""What a node says of its health: places to write, limits, GPUs, network adapters. Standard library only."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.command_output import read_command
from gspo_megatron.cluster.scratch_directory import user_name
from gspo_megatron.cluster.visible_devices import query_gpus

MIN_FILES = 4096
"""Open files that a role may need: every response in flight is a connection."""
HEALTH_SECONDS = 20.0
"""A driver that hangs must not hold the job."""
LIMITS = {
    resource.RLIMIT_AS: "address space (bytes)",
    resource.RLIMIT_CPU: "CPU time (seconds)",
    resource.RLIMIT_FSIZE: "file size (bytes)",
}
"""What login nodes limit, and SLURM hands on: a role needs all of it."""
INFINIBAND = Path("/sys/class/infiniband")
GPU_FIELDS = {
    "uncorrected": "ecc.errors.uncorrected.volatile.total",
    "remap_failed": "remapped_rows.failure",
    "remap_pending": "remapped_rows.pending",
    "persistence": "persistence_mode",
}
"""Names of a report, and what nvidia-smi calls them; a GPU without ECC answers `[N/A]`."""
FIX_SCRATCH = "set TMPDIR in the site file to a directory of the node's own disk"
FULL = "remove files there, or have it made larger: its space, its inodes or your quota are used up"
UNKNOWN = "[N/A]"
XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
FATAL_XIDS = {"48", "63", "64", "74", "79", "92", "94", "95", "119", "120"}
"""Of NVIDIA's catalogue: memory, NVLink, fallen off the bus, firmware. The others may be a program's own fault."""


def scratch() -> str:
    """The node's own disk that roles write to. Not tempfile's choice: it takes another place without a word."""
    return os.environ.get("TMPDIR") or "/tmp"


def find_unwritable(places: Mapping[str, str]) -> list[str]:
    """Places where not even a byte can be written.

    Args:
        places: what to do about each, by directory.
    """
    faults = []
    for place, fix in places.items():
        try:
            if Path(place) == caches():
                caches().mkdir(mode=0o700, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=place, prefix=".gspo-") as file:
                file.write(b"0")
                file.flush()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            faults.append(f"{place} cannot be written ({error.strerror}); {FULL if full else fix}")
    return faults


def find_noexec() -> list[str]:
    """Whether the node's own disk refuses to run what Triton, Inductor and FlashInfer compile there."""
    try:
        refuses = os.statvfs(scratch()).f_flag & os.ST_NOEXEC
    except OSError:  # find_unwritable says so
        return []
    return [f"{scratch()} is mounted noexec, and compiled kernels are loaded from it; {FIX_SCRATCH}"] * bool(refuses)


def caches() -> Path:
    """Where roles keep what they compile (launch/lib/start.sh) and a server its sockets."""
    return Path(scratch()) / f"gspo-{user_name()}"


def places(attempt: Path) -> dict[str, str]:
    """Where every role writes, and the cure of each."""
    return {
        str(attempt): "mount it writable on every node, or give another run.directory",
        scratch(): FIX_SCRATCH,
        str(caches()): "remove it if it is yours, or set TMPDIR in the site file",
        "/dev/shm": "mount a tmpfs there (of a container: --shm-size, or the host's); TMPDIR does not replace it",
    }


def raise_limits() -> None:
    """Allow as much as the node allows at all: soft limits are those of the shell that submitted the job."""
    for number in (resource.RLIMIT_NOFILE, *LIMITS):
        _, hard = resource.getrlimit(number)
        resource.setrlimit(number, (hard, hard))


def find_limits(has_rdma: bool) -> tuple[list[str], list[str]]:
    """Limits that are too small: what stops a role, and what only makes it slow."""
    faults, warnings = [], []
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < MIN_FILES:
        faults.append(
            f"a process may open {files} files, {MIN_FILES} are needed; raise LimitNOFILE of slurmd, or the hard limit"
        )
    for number, what in LIMITS.items():
        _, hard = resource.getrlimit(number)
        if hard != resource.RLIM_INFINITY:
            faults.append(f"{what} of a process is limited to {hard}; have that hard limit raised (ulimit -a shows it)")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if has_rdma and locked != resource.RLIM_INFINITY:
        warnings.append(
            f"locked memory is limited to {locked >> 10} KiB, RDMA registers all that it sends; set "
            "LimitMEMLOCK=infinity of slurmd, and PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
        )
    return faults, warnings


def find_adapters() -> list[str]:
    """States of the InfiniBand and RoCE ports: `mlx5_0/1 4: ACTIVE`."""
    found = []
    for state in sorted(INFINIBAND.glob("*/ports/*/state")):
        try:
            found.append(f"{state.parts[-4]}/{state.parts[-2]} {state.read_text().strip()}")
        except OSError:
            continue
    return found


def find_gpu_health() -> dict[str, dict[str, str]]:
    """Health of every GPU that nvidia-smi lists, by UUID; empty where it knows none of it."""
    rows = query_gpus(*GPU_FIELDS.values(), timeout=HEALTH_SECONDS)
    found = {uuid: dict(zip(GPU_FIELDS, fields, strict=True)) for uuid, *fields in rows}
    if found or shutil.which("nvidia-smi") is None:
        return found
    # One field that this version does not know makes it answer none: each is asked alone.
    for name, field in GPU_FIELDS.items():
        for uuid, value in query_gpus(field, timeout=HEALTH_SECONDS):
            found.setdefault(uuid, dict.fromkeys(GPU_FIELDS, UNKNOWN))[name] = value
    return found


def find_xids() -> list[str]:
    """Xid errors in the kernel's log, `0000:1a:00 79`; empty where a user may not read it."""
    found = XID.findall(read_command("dmesg", timeout=HEALTH_SECONDS))
    return sorted({f"{bus} {number}" for bus, number in found if number in FATAL_XIDS})


def ask_dcgm() -> str:
    """What NVIDIA's DCGM says where it runs: `Healthy`, `Warning` or `Failure`; empty elsewhere."""
    # A failure may be its exit code too.
    said = read_command("dcgmi", "health", "--check", timeout=HEALTH_SECONDS, any_code=True)
    match = re.search(r"Overall Health\W+(\w+)", said)
    return match[1] if match else ""


def describe_health(attempt: Path) -> dict[str, Any]:
    """The part of a report that is about the node itself."""
    adapters = find_adapters()
    faults, warnings = find_limits(has_rdma=bool(adapters))
    return {
        "faults": [*find_unwritable(places(attempt)), *find_noexec(), *faults],
        "warnings": warnings,
        "adapters": adapters,
        "gpu_health": find_gpu_health(),
        "xids": find_xids(),
        "dcgm": ask_dcgm(),
    }
