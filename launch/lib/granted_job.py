"""What SLURM says of this job, and the commands about it that its log begins with. Standard library only."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gspo_megatron.cluster.command_output import TOOL_SECONDS, read_command
from gspo_megatron.cluster.slurm_allocation import drop_options, read_allocation, resume_options
from gspo_megatron.cluster.slurm_commands import describe_job
from gspo_megatron.cluster.slurm_steps import Step
from gspo_megatron.cluster.slurm_words import SLURM_WORDS, reasons
from gspo_megatron.cluster.visible_devices import VARIABLE, query_gpus, select_devices
from launch.lib.attempt import wait_for_slurm
from launch.lib.plan_request import Plan, Refused
from launch.lib.settings import Settings

HOME = Path(__file__).resolve().parent.parent.parent
SCRIPT = HOME / "launch" / "gspo_moe.sh"
COUNT = re.compile(r"(?:[^:]+:)?(\d+)")
"""A number of an option of sbatch, with or without a type: `h100:8`."""


STARTS = "gspo: a step starts in"
"""What a step says that tries the site's options of srun."""


@dataclass(frozen=True)
class Job:
    """The SLURM job."""

    id: str
    hosts: tuple[str, ...]
    """Names of its nodes, trainers first."""
    gpus: int
    """GPUs of a node; 0 = none that anybody names."""
    apart: int = 0
    """Nodes of the second component of a heterogeneous job, which run the servers."""
    options: tuple[str, ...] = ()
    """What sbatch was given beside the number of nodes."""
    name: str = ""
    """What names it alone, where it is not the id: `12_3` for a task of an array."""


def header_number(header: str, option: str) -> int | None:
    """What sbatch takes from the script's own lines; None where a site has taken the line out."""
    match = re.search(rf"^#SBATCH --{option}=(\S+)", header, re.MULTILINE)
    number = COUNT.fullmatch(match[1]) if match else None
    return int(number[1]) if number else None


def find_job(job_id: str, name: str, settings: Settings, given: dict[str, str]) -> tuple[Job, Settings]:
    """The job, and the settings of its sruns.

    Args:
        job_id: its number.
        name: what names it alone: `12_3` for a task of an array.
        settings: of the site.
        given: the environment that SLURM gave this process. Its own holds no option of SLURM's commands any more.

    Raises:
        Refused: SLURM's commands are not there, srun does not take the site's options, or several tasks of an srun run
            this script.
    """
    for program in ("scontrol", "squeue", "srun"):
        if shutil.which(program) is None:
            raise Refused(
                f"PATH: {program} is not on it; add the folder of SLURM's commands in the site file (GSPO_SITE)"
            )
    tasks = given.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdigit() and int(tasks) > 1 and runs_in_step(job_id, given):
        raise Refused(f"{tasks} tasks of an srun run this script; call it without srun, it starts its own steps")
    record = wait_for_slurm(lambda: describe_job(name) or None)
    allocation = read_allocation(given, record, read_command("scontrol", "show", "topology"))
    drop_options(os.environ, allocation.is_heterogeneous, is_array=name != job_id)
    settings = replace(settings, allocation=allocation)
    try_arguments(settings)
    options = resume_options(record, allocation.gpus, header_number(SCRIPT.read_text(), "gpus-per-node"))
    known = [count for count in (settings.gpus, allocation.gpus) if count]
    gpus = min(known) if known else list_gpus(settings)
    if allocation.gpus:
        settings = replace(settings, allocation=replace(allocation, gpus=gpus))
    return Job(job_id, allocation.hosts, gpus, allocation.apart, tuple(options), name), settings


def runs_in_step(job_id: str, given: Mapping[str, str]) -> bool:
    """Whether this process is a task of a step of its job: sbatch hands on what a step of another job has set."""
    step = f"{job_id}.{given.get('SLURM_STEP_ID', '')}"
    return f"StepId={step} " in read_command("scontrol", "show", "step", step)


def try_arguments(settings: Settings) -> None:
    """Run a step with the site's options of srun, before any step whose failure could have another reason.

    Raises:
        Refused: it fails, with srun's words; or it starts no program, or not where the roles need to start.
    """
    if not settings.srun_arguments:
        return
    command = ("sh", "-c", f'echo "{STARTS} $(pwd -P)"')
    step = settings.srun_outside(Step("options", settings.allocation.hosts[:1]), command)
    done = subprocess.run(step, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = [line for line in reasons(done.stderr.splitlines()) if SLURM_WORDS.match(line)]
        why = said[-1] if said else f"srun ended with {done.returncode}"
    else:
        here, found = os.path.realpath(os.getcwd()), re.search(rf"{STARTS} (.*)", done.stdout)
        if found is not None and found[1] == here:
            return
        why = "srun starts no program, or its output goes elsewhere"
        if found is not None:
            why = f"the step starts in {found[1]}, roles start in {here}"
    raise Refused(f"GSPO_SRUN_ARGS={shlex.join(settings.srun_arguments)}: {why}; correct it in the site file")


def list_gpus(settings: Settings) -> int:
    """GPUs that nvidia-smi lists on the first node, for a site whose SLURM does not count them."""
    # On a node with a lost GPU it may never answer.
    within = ("timeout", "--kill-after=5", f"{TOOL_SECONDS:g}")
    through = settings.srun_outside(Step("gpus", settings.allocation.hosts[:1]), within)
    uuids = [uuid for (uuid,) in query_gpus(timeout=None, through=through)]
    return len(select_devices(os.environ.get(VARIABLE), uuids))


def print_commands(job: Job, plan: Plan, arguments: Sequence[str], attempt: Path, called_in: Path) -> str:
    """Print one line each: follow, attach, cancel, resume. Returns the command that resumes."""
    sizes = [f"--nodes={len(job.hosts)}", *job.options]
    kept = [word for word in arguments if not word.startswith("run.directory=")]
    script = ["launch/gspo_moe.sh"] if called_in == HOME else [f"--chdir={called_in}", str(SCRIPT)]
    words = ["sbatch", *sizes, *script, *kept, f"run.directory={plan.run_dir}"]
    resume = shlex.join(words)
    if job.apart:
        resume = f"the same two components again, with run.directory={plan.run_dir}"
    print(f"follow      tail -F {HOME / attempt}/trainer-{job.hosts[0]}.log")
    print(f"attach      srun --jobid={job.id} --overlap --pty --nodelist={job.hosts[0]} bash")
    name = job.name or job.id
    print(f"cancel      scancel {name}; with a checkpoint first: scancel --batch --signal=USR1 {name}")
    print(f"resume      {resume}", flush=True)
    return resume
