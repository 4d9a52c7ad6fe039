"""What SLURM gave a job, by what SLURM says: nodes, CPUs, GPUs. What it does not say stays unknown.

Runs on the batch node, with the standard library only.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from gspo_megatron.cluster.slurm_commands import expand_hosts, read_field

KEPT = re.compile(
    r"SLURM_(CONF|JOBID|JOB_.*|HET_.*|CLUSTER_NAME|WORKING_CLUSTER|RESTART_COUNT|SUBMIT_.*|ARRAY_.*|CPUS_ON_NODE|"
    r"GPUS_ON_NODE|TOPOLOGY_.*|NODEID|PROCID|LOCALID|GTIDS|TASK_PID|TMPDIR|DEBUG|PMIX.*|EXPERIMENTAL.*)"
)
"""Variables of SLURM that say which job this is. The others are options that srun, squeue and scontrol would take."""
OPTION = re.compile(r"(SLURM|SRUN|SQUEUE|SCONTROL)_")
LEAF = re.compile(r"(?:\bLevel=0\b|\bBlockName=\S+).*?\bNodes=(\S+)")
"""Nodes of the lowest switches (topology/tree) or of a block (topology/block)."""
GPUS = re.compile(r"(?:^|,)gpu(?::[^:,=]+)*[:=](\d+)")
"""A count of GPUs in SLURM's words: `gpu:h100:8`, `gpu:8`."""
COMPONENT = re.compile(r"SLURM_(HET_|.*_HET_GROUP_\d+$)")
"""Variables of the components of a heterogeneous job."""
ARRAY = re.compile(r"SLURM_ARRAY_")
HETEROGENEOUS = re.compile(r"\bHetJobId=")
"""In the record of a component of a heterogeneous job."""


@dataclass(frozen=True)
class Allocation:
    """Nodes of a job and what SLURM counts on each."""

    hosts: tuple[str, ...] = ()
    """Names of the nodes; of a heterogeneous job the first component's first."""
    apart: int = 0
    """Nodes of the second component of a heterogeneous job; 0 = it has one component."""
    cpus: tuple[int, ...] = (0,)
    """CPUs of the smallest node of each component; 0 = SLURM does not say."""
    gpus: int = 0
    """GPUs that SLURM granted on the smallest node; 0 = none that it names."""

    @property
    def is_heterogeneous(self) -> bool:
        """Whether the job has components with nodes of their own."""
        return self.apart > 0

    def component(self, kind: str) -> int:
        """Which component a kind of role runs on."""
        return int(self.is_heterogeneous and kind == "rollout")


def read_allocation(environment: MutableMapping[str, str], record: str, topology: str = "") -> Allocation:
    """The allocation of this process's job.

    Args:
        environment: of the batch script, or of a shell that salloc started.
        record: what `scontrol show job -d` says; empty when slurmctld does not answer.
        topology: what `scontrol show topology` says; empty on a site that describes none.
    """
    leaves = [expand_hosts(folded) for folded in LEAF.findall(topology)]
    # Inherited by a job that the script of a heterogeneous one submits.
    if not environment.get("SLURM_HET_SIZE") or (record and not HETEROGENEOUS.search(record)):
        hosts = expand_hosts(environment["SLURM_JOB_NODELIST"])
        cpus = smallest(environment.get("SLURM_JOB_CPUS_PER_NODE", "")) or smallest(
            environment.get("SLURM_CPUS_ON_NODE", "")
        )
        return Allocation(sort_by_switch(hosts, leaves), 0, (cpus,), named_gpus(environment, record))
    first, second = (expand_hosts(environment[f"SLURM_JOB_NODELIST_HET_GROUP_{group}"]) for group in (0, 1))
    cpus_of = [smallest(environment.get(f"SLURM_JOB_CPUS_PER_NODE_HET_GROUP_{group}", "")) for group in (0, 1)]
    hosts = (*sort_by_switch(first, leaves), *sort_by_switch(second, leaves))
    return Allocation(hosts, len(second), tuple(cpus_of), named_gpus(environment, record))


def sort_by_switch(hosts: Sequence[str], leaves: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Nodes of one switch beside each other, those of the fullest switch first: the first nodes train.

    Args:
        hosts: of the job, in SLURM's order, which is kept otherwise.
        leaves: nodes of each switch, or NVLink domain, of the site.
    """
    switch = {node: index for index, nodes in enumerate(leaves) for node in nodes}
    places = [switch.get(host, -1) for host in hosts]
    order = sorted(range(len(hosts)), key=lambda i: (-places.count(places[i]), places.index(places[i]), i))
    return tuple(hosts[i] for i in order)


def smallest(text: str) -> int:
    """The least number of `64(x2),32`; 0 where there is none."""
    numbers = re.findall(r"\d+", re.sub(r"\(x\d+\)", "", text))
    return min(map(int, numbers), default=0)


def named_gpus(environment: MutableMapping[str, str], record: str) -> int:
    """GPUs of a node by the first source that names any; 0 = SLURM names none.

    The record counts what each node was really given, whatever the job asked for. The variables are those of the
    batch node, or of the request.
    """
    given = [count_gpus(words) for words in re.findall(r" CPU_IDs=\S* Mem=\S* GRES=(\S*)", record)]
    if any(given):
        return min(given)
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    asked = environment.get("SLURM_GPUS_PER_NODE", "")
    listed = [word for word in environment.get("SLURM_JOB_GPUS", "").split(",") if word]
    return smallest(on_node) or smallest(asked.rpartition(":")[2]) or len(listed)


def count_gpus(gres: str) -> int:
    """GPUs in `gpu:h100:8(IDX:0-3,5-8),nic:2`, of all types together."""
    return sum(map(int, GPUS.findall(re.sub(r"\([^)]*\)", "", gres))))


def drop_options(environment: MutableMapping[str, str], is_heterogeneous: bool = True, is_array: bool = True) -> None:
    """Take away what srun, squeue and scontrol would read as options of the user's shell or of sbatch.

    Args:
        environment: of this process.
        is_heterogeneous: whether the job has components; otherwise variables of components are a parent's.
        is_array: whether the job is a task of an array; otherwise variables of arrays are a parent's.
    """
    for name in list(environment):
        is_option = OPTION.match(name) and not KEPT.fullmatch(name)
        inherited = (not is_heterogeneous and COMPONENT.match(name)) or (not is_array and ARRAY.match(name))
        if is_option or inherited:
            del environment[name]


def resume_options(record: str, gpus: int, header_gpus: int | None) -> list[str]:
    """Options of sbatch that this job had and the script's own lines do not say.

    Args:
        record: what `scontrol show job` says.
        gpus: that SLURM counts on a node.
        header_gpus: of the script's `#SBATCH` lines; null = they do not ask for GPUs.
    """
    options = [f"--gpus-per-node={gpus}"] if gpus != (header_gpus or 0) else []
    asked = [*RESUMED, *(SHARED if read_field(record, "OverSubscribe") == "USER" else [])]
    options += [
        f"--{option}={value.lower()}" if option == "exclusive" else f"--{option}={value}"
        for field, option in asked
        if (value := read_field(record, field))
    ]
    return [*options, *(["--no-requeue"] if read_field(record, "Requeue") == "0" else [])]


RESUMED: Sequence[tuple[str, str]] = (
    ("Partition", "partition"),
    ("Account", "account"),
    ("QOS", "qos"),
    ("TimeLimit", "time"),
    ("Features", "constraint"),
    ("Reservation", "reservation"),
    ("ExcNodeList", "exclude"),
)
"""Fields of the record, and the options that they come from."""
SHARED: Sequence[tuple[str, str]] = (
    ("OverSubscribe", "exclusive"),
    ("CPUs/Task", "cpus-per-task"),
    ("MinMemoryNode", "mem"),
)
"""The same of a job that shares its nodes with others of its user; the script's own lines ask for whole nodes."""
