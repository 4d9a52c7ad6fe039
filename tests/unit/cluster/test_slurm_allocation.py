"""What SLURM says of a job, in the words that it has for it, and what must not reach srun."""

from __future__ import annotations

import random
import re

import pytest

from gspo_megatron.cluster import slurm_allocation
from gspo_megatron.cluster.slurm_allocation import (
    Allocation,
    count_gpus,
    drop_options,
    named_gpus,
    read_allocation,
    resume_options,
    smallest,
)
from gspo_megatron.cluster.slurm_steps import Step, srun

RECORD = (
    "JobId=7 JobName=gspo Account=team QOS=normal JobState=RUNNING Requeue=1 TimeLimit=1-04:00:00 Partition=gpu "
    "ReqNodeList=(null) ExcNodeList=n[3,5] Nodes=n1 CPU_IDs=0-95 Mem=0 GRES={one} Nodes=n[2,4] CPU_IDs=0-95 Mem=0 "
    "GRES={other} MinCPUsNode=1 Features=h100&ib DelayBoot=00:00:00 Reservation=(null) Command=/a/launch/gspo_moe.sh"
)


def record(one: str, other: str) -> str:
    return RECORD.format(one=one, other=other)


@pytest.mark.parametrize(
    ("environment", "described", "gpus"),
    [
        ({}, "", 0),
        ({"SLURM_GPUS_ON_NODE": "8"}, "", 8),
        # A shell of salloc, and sbatch --gpus-per-node=h100:4.
        ({"SLURM_GPUS_PER_NODE": "8"}, "", 8),
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, "", 4),
        ({"SLURM_GPUS_PER_NODE": "0"}, "", 0),
        ({"SLURM_JOB_GPUS": "0,1,2"}, "", 3),
        # What the nodes were given counts more than what the batch node has: 12 GPUs on two nodes.
        ({"SLURM_GPUS_ON_NODE": "8"}, record("gpu:h100:8(IDX:0-7)", "gpu:h100:4(IDX:0-1,6-7)"), 4),
        ({}, record("gpu:8(IDX:0-7),nic:2(IDX:0-1)", "gpu:8(IDX:0-7)"), 8),
        ({}, record("gpu:1g.10gb:7(IDX:0-6)", "gpu:1g.10gb:7(IDX:0-6)"), 7),
        ({}, record("gpu:a100:2(IDX:0-1),gpu:h100:2(IDX:2-3)", "gpu:h100:4(IDX:0-3)"), 4),
        ({}, record("shard:8", "shard:8"), 0),
        ({"SLURM_GPUS_ON_NODE": "8"}, record("", ""), 8),
    ],
)
def test_gpus_by_whatever_names_them(environment: dict[str, str], described: str, gpus: int) -> None:
    assert named_gpus(environment, described) == gpus


def test_more_tasks_than_cpus_share_them() -> None:
    words = srun(Step("trainer", ("n1",), 2), ("true",), Allocation(("n1",), cpus=(1,)))
    assert "--overcommit" in words and "--cpus-per-task=1" in words
    assert "--overcommit" not in srun(Step("trainer", ("n1",), 2), ("true",), Allocation(("n1",), cpus=(2,)))


TREE = """SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=n1,n4
SwitchName=leaf2 Level=0 LinkSpeed=1 Nodes=n2,n3,n5
SwitchName=top Level=1 LinkSpeed=1 Nodes=n1,n2,n3,n4,n5 Switches=leaf[1-2]
"""
BLOCKS = "BlockName=b1 BlockIndex=0 Nodes=n1,n4 BlockSize=2\nBlockName=b2 BlockIndex=1 Nodes=n2,n3,n5 BlockSize=3\n"


@pytest.mark.parametrize(
    ("topology", "hosts", "order"),
    [
        ("", "n1,n2,n3,n4,n5", "n1 n2 n3 n4 n5"),
        (TREE, "n1,n2,n3,n4,n5", "n2 n3 n5 n1 n4"),
        (BLOCKS, "n1,n2,n3,n4,n5", "n2 n3 n5 n1 n4"),
        (TREE, "n1,n2,n4,n5", "n1 n4 n2 n5"),
        (TREE, "other1,n2,other2,n3", "other1 other2 n2 n3"),
        ("SwitchName=flat Level=0 LinkSpeed=1 Nodes=n1,n2,n3\n", "n3,n1", "n3 n1"),
    ],
)
def test_trainers_get_the_nodes_of_the_fullest_switch(
    monkeypatch: pytest.MonkeyPatch, topology: str, hosts: str, order: str
) -> None:
    monkeypatch.setattr(slurm_allocation, "expand_hosts", lambda folded: folded.split(","))
    assert read_allocation({"SLURM_JOB_NODELIST": hosts}, "", topology).hosts == tuple(order.split())


@pytest.mark.parametrize(
    ("text", "number"), [("", 0), ("192(x2)", 192), ("64(x12),32", 32), ("32,64(x2)", 32), ("8", 8)]
)
def test_nodes_that_differ_count_as_the_smallest(text: str, number: int) -> None:
    assert smallest(text) == number


def test_cpus_of_a_shell_of_salloc_and_of_a_heterogeneous_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_allocation, "expand_hosts", lambda folded: folded.split(","))
    shell = {"SLURM_JOB_NODELIST": "n1,n2", "SLURM_JOB_CPUS_PER_NODE": "96(x2)"}
    assert read_allocation(shell, "") == Allocation(("n1", "n2"), 0, (96,), 0)
    unsaid = {"SLURM_JOB_NODELIST": "n1"}
    assert "--cpus-per-task" not in " ".join(srun(Step("trainer", ("n1",)), ("true",), read_allocation(unsaid, "")))
    two = {
        "SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "n1,n2", "SLURM_JOB_NODELIST_HET_GROUP_1": "n3",
        "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0": "96(x2)", "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1": "32",
        "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip
    found = read_allocation(two, "")
    assert found == Allocation(("n1", "n2", "n3"), 1, (96, 32), 8)
    for kind, component, cpus in (("trainer", 0, 96), ("rollout", 1, 32), ("controller", 0, 96)):
        words = srun(Step(kind, ("n1",)), ("true",), found)
        assert {f"--het-group={component}", f"--cpus-per-task={cpus}"} <= set(words)


def test_every_srun_says_what_it_would_take_from_a_site_or_from_sbatch() -> None:
    words = srun(Step("trainer", ("n1", "n2"), 2), ("true",), Allocation(("n1", "n2"), 0, (96,), 8), ("--mpi=pmix",))
    assert set(words) >= {
        "--export=ALL", "--mpi=none", "--gpus-per-node=8", "--gpu-bind=none", "--cpu-bind=none", "--cpus-per-task=48",
        "--kill-on-bad-exit=1", "--wait=0", "--mem=0", "--overlap", "--input=none", "--ntasks-per-node=2",
    }  # fmt: skip
    assert words.index("--mpi=pmix") > words.index("--mpi=none"), "the last one counts"
    assert words[-1] == "true"
    assert not [word for word in srun(Step("a", ("n1",)), ("true",), Allocation(("n1",))) if "gpu" in word]


INPUTS = re.findall(
    r"\w+",
    "ACCOUNT BCAST CLUSTERS CONSTRAINT CPUS_PER_GPU CPUS_PER_TASK CPU_BIND CPU_BIND_TYPE CPU_FREQ_REQ "
    "DEPENDENCY DISTRIBUTION DIST_PLANESIZE EPILOG EXACT EXCLUSIVE EXPORT_ENV GPUS GPUS_PER_NODE "
    "GPUS_PER_SOCKET GPUS_PER_TASK GPU_BIND GPU_FREQ GRES GRES_FLAGS HINT IMMEDIATE KILL_BAD_EXIT LABELIO "
    "MEM_BIND MEM_PER_CPU MEM_PER_GPU MEM_PER_NODE MPI_TYPE NETWORK NNODES NODELIST NO_KILL NPROCS NTASKS "
    "NTASKS_PER_CORE NTASKS_PER_GPU NTASKS_PER_NODE NTASKS_PER_TRES OPEN_MODE OVERCOMMIT OVERLAP PARTITION "
    "PROFILE PROLOG QOS REMOTE_CWD REQ_SWITCH RESERVATION SIGNAL SPREAD_JOB STDERRMODE STDINMODE STDOUTMODE "
    "STEP_GRES TASKS_PER_NODE TASK_EPILOG TASK_PROLOG THREADS THREADS_PER_CORE THREAD_SPEC TIMELIMIT "
    "TIME_FORMAT TRES_BIND TRES_PER_TASK UNBUFFEREDIO WAIT WCKEY WORKING_DIR",
)
"""Of the man pages of srun, squeue and scontrol, 22.05 to 24.11."""
FACTS = {
    "SLURM_CONF": "/a", "SLURM_JOB_ID": "7", "SLURM_JOBID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": "1",
    "SLURM_JOB_END_TIME": "9", "SLURM_ARRAY_JOB_ID": "6", "SLURMD_NODENAME": "n1", "PATH": "/bin", "NCCL_DEBUG": "INFO",
    "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_TMPDIR": "/scratch/7",
}  # fmt: skip


def test_options_are_taken_out_of_the_environment_and_facts_stay() -> None:
    draw = random.Random(0)
    for _ in range(100):
        chosen = draw.sample(INPUTS, draw.randint(1, len(INPUTS)))
        others = ["SRUN_CPUS_PER_TASK", "SRUN_EXPORT_ENV", "SQUEUE_PARTITION", "SQUEUE_USERS", "SCONTROL_FEDERATION"]
        hostile = {**{f"SLURM_{name}": "1" for name in chosen}, **dict.fromkeys(others, "1")}
        items = [*hostile.items(), *FACTS.items()]
        draw.shuffle(items)
        environment = dict(items)
        drop_options(environment)
        assert environment == FACTS


def test_variables_of_an_array_that_sbatch_was_called_in_do_not_count() -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    for is_array in (True, False):
        environment = {"SLURM_JOB_ID": "9", **array}
        drop_options(environment, is_array=is_array)
        assert environment == {"SLURM_JOB_ID": "9", **(array if is_array else {})}


def test_the_resume_options_are_those_that_the_script_does_not_say() -> None:
    described = record("gpu:h100:8(IDX:0-7)", "gpu:h100:8(IDX:0-7)")
    options = ["--partition=gpu", "--account=team", "--qos=normal", "--time=1-04:00:00", "--constraint=h100&ib",
               "--exclude=n[3,5]"]  # fmt: skip
    assert resume_options(described, 8, 8) == options
    assert resume_options(described, 4, 8) == ["--gpus-per-node=4", *options]
    # A site that counts no GPUs: with the script's line sbatch would refuse the job, without it it needs none.
    assert resume_options("", 0, 8) == ["--gpus-per-node=0"] and resume_options("", 0, None) == []
    shared = "JobId=7 OverSubscribe=USER NumCPUs=32 CPUs/Task=32 MinCPUsNode=32 MinMemoryNode=400G"
    assert resume_options(shared, 8, 8) == ["--exclusive=user", "--cpus-per-task=32", "--mem=400G"]
    assert resume_options(shared.replace("USER", "NO"), 8, 8) == []
    bare = "JobId=7 Account=(null) QOS=N/A TimeLimit=UNLIMITED Partition=lab Requeue=0 Features=(null)"
    assert resume_options(bare, 8, 8) == ["--partition=lab", "--no-requeue"]


def test_a_count_in_slurm_s_words() -> None:
    assert [count_gpus(text) for text in ("gpu:h100:8(S:0-1)", "gpu:2,gpu:a:3", "(null)", "nic:4")] == [8, 5, 0, 0]
