"""What scontrol and squeue answer. Runs on the batch node, with the standard library only."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from gspo_megatron.cluster.command_output import read_command

T = TypeVar("T")
SLURM_SECONDS = 900.0
"""How long a slurmctld that does not answer is waited for."""
RETRY_SECONDS = 2.0
"""Between two questions to slurmctld."""
REQUEUE_SECONDS = 60.0
"""SLURM ends this process within it, once it has queued the job again."""
REFUSALS = 3
"""Times that a slurmctld which answers may refuse to queue the job again: once it may have been starting."""


HOLDING = ("RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "CONFIGURING")
"""States of a job that has nodes and will go on."""
FREE_TEXT = re.compile(r"(Command|WorkDir|StdErr|StdIn|StdOut|\w*Comment|Extra|MailUser|Container|SubmitLine)=")
"""Lines of a record in which anything may stand."""
NO_VALUE = ("(null)", "N/A", "None", "UNLIMITED", "Partition_Limit", "Unknown")
"""A record has these where there is no value."""


def expand_hosts(folded: str) -> list[str]:
    """`node1`, `node2` for `node[1-2]`."""
    return read_command("scontrol", "show", "hostnames", folded).split()


def plain_names(nodes: Sequence[str]) -> Sequence[str]:
    """The same nodes without `node[1-2]`; as they are where SLURM cannot read one."""
    return (expand_hosts(",".join(nodes)) or nodes) if any(set(node) & set("[,") for node in nodes) else nodes


def describe_job(job: str, timeout: float | None = None) -> str:
    """SLURM's record of a job without what people write; empty when slurmctld does not answer.

    Returns:
        One line for each component: the fields that SLURM itself fills in.
    """
    components: list[list[str]] = []
    for line in read_command("scontrol", "show", "job", "-d", job, timeout=timeout).splitlines():
        if line.startswith("JobId="):
            components.append([line.partition(" JobName=")[0]])
        elif components and line.startswith(" ") and not FREE_TEXT.match(line.strip()):
            components[-1].append(line.strip())
    return "\n".join(" ".join(lines) for lines in components)


def read_field(record: str, name: str) -> str:
    """A field of a job's record, or of its first component's; empty where it is absent, or has no value.

    The last one of that name counts: a job's name may hold lines that look like fields, and it stands first.
    """
    found = re.findall(rf"(?:^|\s){name}=(\S+)", record.partition("\n")[0])
    return found[-1] if found and found[-1] not in NO_VALUE else ""


def await_answer(ask: Callable[[], T | None]) -> T | None:
    """What slurmctld answers; waits for one that restarts, because no answer does not mean that nothing runs.

    Args:
        ask: returns None while there is no answer.

    Returns:
        None when it does not answer for `SLURM_SECONDS`.
    """
    deadline, waited = time.monotonic() + SLURM_SECONDS, False
    while True:
        answer = ask()
        if answer is not None or time.monotonic() > deadline:
            return answer
        if not waited:
            print(f"gspo: slurmctld does not answer; waiting for it{_say_why()}", flush=True)
            waited = True
        time.sleep(RETRY_SECONDS)


def _say_why() -> str:
    """What SLURM says of that: its configuration may be missing, and not slurmctld."""
    try:
        asked = subprocess.run(
            ("scontrol", "show", "config"), stdin=subprocess.DEVNULL, capture_output=True, errors="replace"
        )
    except OSError as error:
        return f" (scontrol: {error.strerror})"
    said = asked.stderr.strip().rpartition("\n")[2]
    return f" ({said})" if said else ""


def is_ending(record: str) -> bool:
    """Whether SLURM is ending a job, or has queued it again."""
    return read_field(record, "JobState") not in ("", *HOLDING)


def task_name(job: str) -> str:
    """What names one task of a job array alone, `12_3`: the id of the last one names the whole array too.

    Returns:
        The id itself for a job that is no array, and when slurmctld does not answer.
    """
    for line in read_command("squeue", "--noheader", "--all", f"--jobs={job}", "--format=%A %F %K").splitlines():
        number, array, index = line.split()
        if number == job and index.isdigit():
            return f"{array}_{index}"
    return job


def is_preempted(record: str) -> bool:
    """Whether a job that runs must make room for another one; SLURM ends it after the partition's GraceTime."""
    return not is_ending(record) and bool(read_field(record, "PreemptTime"))


def may_queue_again(record: str) -> bool:
    """Whether SLURM can queue a job again: not one of salloc, nor with --no-requeue or JobRequeue=0."""
    return read_field(record, "Requeue") == "1" and read_field(record, "BatchFlag") != "0"


def running_jobs() -> list[str] | None:
    """Ids of the jobs that hold nodes, of every user and partition that squeue shows: a run directory may be shared.

    Returns:
        None when slurmctld does not answer. The present job runs, so the list is never empty otherwise.
    """
    states = f"--states={','.join(('COMPLETING', *HOLDING))}"
    return read_command("squeue", "--noheader", "--all", states, "--format=%A").split() or None


def queue_again(job: str, without: Sequence[str]) -> None:
    """Ask until slurmctld accepts, which ends this process; returns when it refuses or stays silent.

    Args:
        job: this one.
        without: nodes that it must not run on.
    """
    deadline, refusals = time.monotonic() + SLURM_SECONDS, 0
    while refusals < REFUSALS and time.monotonic() < deadline:
        # SIGTERM follows at once, and may end this process only after the nodes are said.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        done = subprocess.run(("scontrol", "requeue", job), stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            _exclude(job, without)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if done.returncode == 0:
            time.sleep(REQUEUE_SECONDS)
            break
        refusals += bool(describe_job(job))
        time.sleep(RETRY_SECONDS)


def exclusion_fault(record: str, nodes: Sequence[str]) -> str:
    """Why SLURM could never start a job again without some nodes, as half a sentence; empty where it can."""
    asked = expand_hosts(read_field(record, "ReqNodeList") or ",")
    if named := [node for node in nodes if node in asked]:
        return f"--nodelist asks for {', '.join(named)}"
    partition = read_field(record, "Partition")
    described = read_command("scontrol", "show", "partition", partition)
    has = {host for folded in re.findall(r"^ *Nodes=(\S+)", described, re.MULTILINE) for host in expand_hosts(folded)}
    left = len(has - {*nodes, *expand_hosts(read_field(record, "ExcNodeList") or ",")})
    wanted = re.match(r"\d+", read_field(record, "NumNodes"))
    if not has or wanted is None or left >= int(wanted[0]):
        return ""
    return f"partition {partition} has {left} other node{'s' * (left != 1)} and the job takes {wanted[0]}"


def _exclude(job: str, nodes: Sequence[str]) -> None:
    """SLURM accepts this for a job that waits, not for one that runs."""
    nodes = plain_names(nodes)
    # One name that SLURM does not know makes it refuse all of them.
    known = [node for node in nodes if read_command("scontrol", "show", "node", node)]
    if gone := sorted(set(nodes) - set(known)):
        print(f"gspo: not excluded, because SLURM knows no such node: {', '.join(gone)}", flush=True)
    record = describe_job(job)
    if known and (fault := exclusion_fault(record, known)):
        print(f"gspo: not excluded, because {fault}: {', '.join(known)}", flush=True)
    elif known:
        before = read_field(record, "ExcNodeList")
        names = ",".join([*([before] if before else []), *known])
        subprocess.run(("scontrol", "update", f"JobId={job}", f"ExcNodeList={names}"), stdin=subprocess.DEVNULL)
