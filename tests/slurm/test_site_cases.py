"""Sites that differ, as one table: each case is a job with cheap roles, and what it must come to.

All jobs are submitted at once, on nodes of their own where they have any; SLURM queues them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.slurm.jobs import END, ROOT, Job, Workplace, make_run, refused
from tests.slurm.leftovers import check_nothing_left

pytestmark = pytest.mark.timeout(900)
STEPS = "trainer.max_steps=4"
GPU_RUN = ("placement.gpu=h100", "trainer.ranks=2", STEPS)
EIGHT = "0,1,2,3,4,5,6,7"
SYSTEM = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
NVIDIA_SMI = """#!/bin/bash
# Eight GPUs. Where there is a folder `sick`, those of the first node that asks have memory errors.
here=$(dirname "$0")
if [ -d "$here/sick" ]; then mkdir "$here/sick/found" 2>/dev/null && hostname >"$here/sick/found/node"; fi
errors=0
[ "$(cat "$here/sick/found/node" 2>/dev/null)" != "$(hostname)" ] || errors=7
for index in {0..7}; do
    case $* in
    *ecc.errors*) echo "GPU-$index, $errors, No, No, Enabled" ;;
    *memory.used*) echo "GPU-$index, NVIDIA H100 80GB HBM3, 580.1, 4" ;;
    *uuid,name*) echo "GPU-$index, NVIDIA H100 80GB HBM3" ;;
    *uuid*) echo "GPU-$index" ;;
    esac
done
"""


def comes_to_done(job: Job) -> None:
    """Finished, each step once, and nothing of the attempt is left."""
    assert job.finish(END) == "COMPLETED" and (job.run_dir / "DONE").exists(), job.everything()
    assert job.steps() == [1, 2, 3, 4]
    assert not list(job.run_dir.glob("logs/attempt_*/key")) and not list(job.run_dir.glob("logs/.*"))


def is_refused(*words: str) -> Callable[[Job], None]:
    """Refused with these words in its log."""

    def check(job: Job) -> None:
        said = refused(job)
        assert "Traceback" not in said, said
        for part in words:
            assert part in said, said

    return check


def sees(**expected: str) -> Callable[[Job], None]:
    """Finished, and both ranks saw this in their environment."""

    def check(job: Job) -> None:
        comes_to_done(job)
        found = [{name: facts[name] for name in expected} for facts in job.seen()]
        assert found == [expected, expected], job.seen()

    return check


def sees_every_gpu(job: Job) -> None:
    """Finished, and both ranks saw all GPUs of the job: SLURM bound no task to one."""
    comes_to_done(job)
    assert {facts["CUDA_VISIBLE_DEVICES"] for facts in job.seen()} <= {None, EIGHT}, job.seen()


def goes_elsewhere(job: Job) -> None:
    """Its first node has a GPU with memory errors, its second one not."""
    comes_to_done(job)
    said = job.text()
    (line,) = (job.run_dir / "logs" / "bad_nodes").read_text().splitlines()
    sick = line.split()[0]
    assert line == f"{sick} GPU-0 has 7 uncorrected memory errors (attempt 1)"
    assert f"preflight: {sick}: GPU-0 has 7 uncorrected memory errors; leave the node out" in said
    assert f"gspo: restart 1 of at most 3, without {sick}" in said
    assert job.lab.job(job.id)["ExcNodeList"] == sick and job.plan(2)["hosts"][0][0] != sick


def warns(*words: str) -> Callable[[Job], None]:
    """Finished, with warnings."""

    def check(job: Job) -> None:
        comes_to_done(job)
        for part in words:
            assert part in job.text(), job.text()

    return check


def stays_where_it_is(*words: str) -> Callable[[Job], None]:
    """Its hardware must not be used, and it is not queued again, because SLURM could never start it."""

    def check(job: Job) -> None:
        said = refused(job)
        for part in (*words, "; to go on without node", "(--exclude): sbatch "):
            assert part in said, said
        assert not (job.run_dir / "logs" / "restarts").exists()

    return check


def opens_files(job: Job) -> None:
    """Its ranks may open as many files as the node allows at all."""
    comes_to_done(job)
    assert all(int(facts["files"]) > 256 for facts in job.seen()), job.seen()


def keeps_what_is_not_ours(job: Job) -> None:
    """Finished beside a directory that a user calls `latest`."""
    comes_to_done(job)
    assert "logs/latest is not ours and stays" in job.text() and not (job.run_dir / "logs" / "latest").is_symlink()


def make_latest_directory(run_dir: Path) -> None:
    (make_run(run_dir) / "logs" / "latest").mkdir(parents=True)


def make_attempt_directory(run_dir: Path) -> None:
    (make_run(run_dir) / "attempt").mkdir(parents=True)


def make_restarts_directory(run_dir: Path) -> None:
    (make_run(run_dir) / "logs" / "restarts").mkdir(parents=True)


def make_a_node_sick(tools: Path) -> None:
    (tools / "sick").mkdir()


def change_nvidia_smi(old: str, new: str, sick: bool = False) -> Callable[[Path], None]:
    """Another nvidia-smi, or with `sick` another one of a node whose GPUs have memory errors."""

    def change(tools: Path) -> None:
        (tools / "nvidia-smi").write_text(NVIDIA_SMI.replace(old, new))
        if sick:
            make_a_node_sick(tools)

    return change


def comes_to_its_number(job: Job) -> None:
    """Finished, and its attempt is known by a number that follows the largest one there."""
    comes_to_done(job)
    assert "not the number of an attempt" not in job.text()
    assert (job.run_dir / "attempt").read_text().startswith(f"20261130120001 {job.id} ")


def make_dated_logs(run_dir: Path) -> None:
    (make_run(run_dir) / "logs" / "attempt_20261130120000").mkdir(parents=True)


@dataclass(frozen=True)
class Case:
    """A job."""

    check: Callable[[Job], None]
    options: Sequence[str] = ()
    overrides: Sequence[str] = (STEPS,)
    environment: Mapping[str, str] = field(default_factory=dict)
    gpus: bool = False
    """Whether nvidia-smi lists eight GPUs on every node."""
    tools: Mapping[str, str] = field(default_factory=dict)
    """What other programs of a node say."""
    bare: bool = False
    """Whether it runs on the cluster whose SLURM counts no GPUs."""
    site: str = ""
    """Text of its site file."""
    directory: str = ""
    """Name of its run directory, where it is not the case's number."""
    prepare: Callable[[Path], object] | None = None
    """Called with the run directory, or with that of its programs, before the job is submitted."""


CASES = {
    "GPUs that nobody names": Case(
        is_refused("[no-gpus] placement.gpu: SLURM names no GPUs of this job", "GSPO_GPUS_PER_NODE"),
        ["--gpus-per-node=0"], GPU_RUN, bare=True
    ),
    "GPUs that only nvidia-smi lists": Case(
        sees(CUDA_VISIBLE_DEVICES=EIGHT), ["--gpus-per-node=0"], GPU_RUN,
        {"CUDA_VISIBLE_DEVICES": EIGHT}, gpus=True, bare=True,
    ),
    "GPUs that only the site names": Case(
        is_refused("1 with 8 GPUs each", "nvidia-smi lists 0 GPUs where"), ["--gpus-per-node=0"], GPU_RUN,
        {"GSPO_GPUS_PER_NODE": "8"}, bare=True
    ),
    "no kind of GPU in the recipe and none granted": Case(
        is_refused("[no-gpus]"), ["--gpus-per-node=0"], ("placement.gpu=null", STEPS), bare=True
    ),
    "a GPU for each task": Case(
        sees_every_gpu, ["--ntasks-per-node=8", "--gpus-per-task=1"], GPU_RUN,
        gpus=True,
    ),
    "a GPU bound to each task": Case(
        sees_every_gpu, [], GPU_RUN, {"SLURM_GPU_BIND": "single:1"}, gpus=True
    ),
    "a GPU with memory errors": Case(
        goes_elsewhere, [], GPU_RUN, gpus=True, prepare=make_a_node_sick
    ),
    "what DCGM and the kernel's log say of the GPUs": Case(
        warns("preflight: warning: ", "kernel's log has Xid 79 of GPU 0000:1a:00", "dcgmi health reports a warning"),
        [], GPU_RUN, gpus=True,
        tools={"dmesg": "[7.0] NVRM: Xid (PCI:0000:1a:00): 79, pid=1", "dcgmi": "| Overall Health | Warning |"},
    ),
    "options of srun and squeue in the user's shell": Case(
        comes_to_done, environment={
            "SLURM_MPI_TYPE": "pmix", "SLURM_WAIT": "1", "SLURM_DISTRIBUTION": "plane=3", "SLURM_EXACT": "1",
            "SLURM_IMMEDIATE": "1", "SLURM_LABELIO": "1", "SLURM_NTASKS_PER_CORE": "1", "SLURM_OPEN_MODE": "t",
            "SLURM_STDOUTMODE": "none", "SLURM_WORKING_DIR": "/nowhere", "SQUEUE_PARTITION": "none",
        },
    ),
    "pmi2 as the site wants it": Case(
        sees(SLURM_MPI_TYPE="pmi2"), environment={"GSPO_SRUN_ARGS": "--mpi=pmi2 --comment='two words'"}
    ),
    "quotes that do not close": Case(
        is_refused("GSPO_SRUN_ARGS=--comment='two cannot be read (No closing quotation)"),
        environment={"GSPO_SRUN_ARGS": "--comment='two"},
    ),
    "tasks and threads of another kind of job": Case(
        comes_to_done, ["--ntasks-per-node=3", "--cpus-per-task=2", "--threads-per-core=1", "--hint=nomultithread"]
    ),
    "a grep of the site file that finds nothing": Case(
        comes_to_done, site="set -o pipefail\nA=$(grep nothing /dev/null | head -1)\ngrep -q nothing /dev/null || B=1\n"
    ),
    "a low soft limit of open files": Case(
        opens_files,
        site="ulimit -Sn 256\n",
    ),
    "no place for temporary files": Case(
        is_refused("/proc cannot be written (", "set TMPDIR in the site file"), environment={"TMPDIR": "/proc"}
    ),
    "a directory that is called latest": Case(
        keeps_what_is_not_ours, prepare=make_latest_directory
    ),
    "a directory that is called attempt": Case(
        is_refused("/attempt is a directory; a run keeps a file of that name"), prepare=make_attempt_directory
    ),
    "a directory that is called restarts": Case(
        is_refused("/logs/restarts is a directory; a run keeps a file of that name"), prepare=make_restarts_directory
    ),
    "percent signs in the run directory": Case(
        is_refused("run.directory: ", "/50%j of holds %, which srun reads as a pattern"), directory="50%j of"
    ),
    "a backslash in the run directory": Case(
        is_refused("run.directory", "back\\slash holds \\, which srun reads as a pattern"), directory="back\\slash"
    ),
    "a nodelist that names a sick node": Case(
        stays_where_it_is("gspo: not queued again, because --nodelist asks for node3"), ["--nodelist=node3"], GPU_RUN,
        gpus=True, prepare=make_a_node_sick,
    ),
    "a sick node where all nodes are needed": Case(
        stays_where_it_is("gspo: not queued again, because partition lab has 1 other node and the job takes 2"),
        ["--nodes=2", "--gpus-per-node=0"], GPU_RUN, gpus=True, bare=True, prepare=make_a_node_sick,
    ),
    "a site file that becomes another program": Case(
        is_refused("_site.sh, line 2: `exec bash -c 'echo instead'`", "without exec"),
        site="exec 9>/dev/null\nexec bash -c 'echo instead'\n",
    ),
    "a site file that takes away what SLURM says": Case(comes_to_done, site="unset ${!SLURM_@} ${!SBATCH_@}\n"),
    "a site file that ignores the ends of processes": Case(
        is_refused("/proc cannot be written ("), environment={"TMPDIR": "/proc"},
        site="trap '' CHLD TERM USR1\nfalse | true\n"
    ),
    "an option that srun does not have": Case(
        is_refused("GSPO_SRUN_ARGS=--mpii=pmix", "unrecognized option '--mpii=pmix'"),
        environment={"GSPO_SRUN_ARGS": "--mpii=pmix"},
    ),
    "a word that is no option of srun": Case(
        is_refused("GSPO_SRUN_ARGS=pmix", "execve(): pmix: No such file"), environment={"GSPO_SRUN_ARGS": "pmix"},
    ),
    "an option of srun where nobody counts GPUs": Case(
        is_refused("Invalid MPI type 'pmi9'"), ["--gpus-per-node=0"], GPU_RUN, {"GSPO_SRUN_ARGS": "--mpi=pmi9"},
        bare=True,
    ),
    "one CPU for two ranks": Case(
        comes_to_done, ["--exclusive=user", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=1G"]
    ),
    "a place for temporary files that is relative": Case(
        is_refused("TMPDIR=scratch is not an absolute path"), environment={"TMPDIR": "scratch"}
    ),
    "a GPU whose memory the driver does not count": Case(
        comes_to_done, [], GPU_RUN, gpus=True, prepare=change_nvidia_smi("580.1, 4", "580.1, [N/A]")
    ),
    "a line of nvidia-smi that is no GPU": Case(
        sees(CUDA_VISIBLE_DEVICES=EIGHT), ["--gpus-per-node=0"], GPU_RUN, {"CUDA_VISIBLE_DEVICES": EIGHT}, gpus=True,
        bare=True, prepare=change_nvidia_smi("errors=0", "errors=0; trap 'echo WARNING: infoROM is bad; exit 14' EXIT"),
    ),
    "a driver that does not know remapped rows": Case(
        goes_elsewhere, [], GPU_RUN, gpus=True,
        prepare=change_nvidia_smi(
            '*ecc.errors*) echo "GPU-$index, $errors, No, No, Enabled"',
            '*remapped*) exit 2 ;;\n    *ecc.errors*) echo "GPU-$index, $errors"', sick=True,
        ),
    ),
    "devices of the user's shell that are none": Case(
        is_refused("[no-gpus]", "CUDA_VISIBLE_DEVICES='' shows none"), ["--gpus-per-node=0"], GPU_RUN,
        {"CUDA_VISIBLE_DEVICES": ""}, gpus=True, bare=True,
    ),
    "more GPUs in the site file than are granted": Case(
        comes_to_done, [], GPU_RUN, {"GSPO_GPUS_PER_NODE": "16"}, gpus=True
    ),
    "logs of a user with a date as their number": Case(comes_to_its_number, prepare=make_dated_logs),
    "functions and switches that the user's shell exports": Case(
        comes_to_done, environment={
            "POSIXLY_CORRECT": "1", "CDPATH": f".:{ROOT}", "SHELLOPTS": "noglob:noclobber", "PYTHONHOME": "/nowhere",
            "PYTHONSAFEPATH": "1", "PYTHONINSPECT": "1", "PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error",
            "BASH_FUNC_cd%%": '() { builtin cd "$@" && ls; }', "BASH_FUNC_grep%%": "() { false; }",
        },
    ),
    "a step and an array that sbatch was called in": Case(
        comes_to_done, environment={
            "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "0", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3",
        },
    ),
    "an option with which srun starts nothing": Case(
        is_refused("GSPO_SRUN_ARGS=--help: srun starts no program"), environment={"GSPO_SRUN_ARGS": "--help"}
    ),
    "an option that sends the logs elsewhere": Case(
        is_refused("or its output goes elsewhere"), environment={"GSPO_SRUN_ARGS": "--output=/dev/null"}
    ),
    "an option that starts the roles elsewhere": Case(
        is_refused("the step starts in /tmp, roles start in"), environment={"GSPO_SRUN_ARGS": "--chdir=/tmp"}
    ),
    "a site file that returns early": Case(
        warns("line 2: `return 3` ended it with 3 and the job goes on"), site="A=1\n[ -d /nowhere ] || return 3\n"
    ),
    "a site file that switches its shell off": Case(
        is_refused("line 1: `set -o noexec` would leave a shell that runs nothing more"), site="set -o noexec\nA=1\n"
    ),
    "libraries of another machine": Case(
        is_refused("no program starts (", "correct its LD_LIBRARY_PATH"),
        site="mkdir -p /tmp/hold-lib\necho x >/tmp/hold-lib/libc.so.6\nexport LD_LIBRARY_PATH=/tmp/hold-lib\n",
    ),
    "an interpreter that does not start": Case(
        is_refused("/tmp/venv-of-nobody/bin/python does not start ("),
        site="mkdir -p /tmp/venv-of-nobody/bin\nGSPO_VENV=/tmp/venv-of-nobody\n"
        "printf '#!/nowhere/python\\n' >$GSPO_VENV/bin/python\nchmod +x $GSPO_VENV/bin/python\n",
    ),
    "soft limits of a login node": Case(comes_to_done, site="ulimit -S -f 4 -t 1 -v 1000000 -n 300\n"),
    "a job name that looks like a record": Case(
        goes_elsewhere, ["--job-name=x Requeue=0 JobState=FAILED ReqNodeList=node[1-6] Command=/x/launch/gspo_moe.sh"],
        GPU_RUN, gpus=True, prepare=make_a_node_sick,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(workplace: Workplace, bare: Workplace) -> Iterator[dict[str, Job]]:
    submitted = {}
    for number, (name, case) in enumerate(CASES.items()):
        submitted[name] = submit(bare if case.bare else workplace, f"case{number}", case)
    with workplace.keeping(submitted.values()), bare.keeping(submitted.values()):
        yield submitted
    for place in (workplace, bare):
        check_nothing_left(place)


def submit(place: Workplace, name: str, case: Case) -> Job:
    tools, site = place.directory / f"{name}_tools", place.directory / f"{name}_site.sh"
    environment = {"PATH": SYSTEM, **case.environment}
    if case.gpus:
        tools.mkdir()
        for program, said in case.tools.items():
            (tools / program).write_text(f"#!/bin/bash\necho '{said}'\n")
            (tools / program).chmod(0o755)
        (tools / "nvidia-smi").write_text(NVIDIA_SMI)
        (tools / "nvidia-smi").chmod(0o755)
        environment["PATH"] = f"{tools}:{SYSTEM}"
    if case.site:
        site.write_text(case.site)
        environment["GSPO_SITE"] = str(site)
    if case.prepare is not None:
        case.prepare(tools if case.gpus else place.directory / name)
    options = ["--nodes=1", *case.options]
    return place.cheap(name, *case.overrides, options=options, directory=case.directory, **environment)


@pytest.mark.parametrize("name", CASES)
def test_a_job_of_another_site(name: str, jobs: dict[str, Job]) -> None:
    CASES[name].check(jobs[name])
