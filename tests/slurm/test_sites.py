"""What the environment of a site does to a job: right, or one sentence. No case starts more than a few roles."""

from __future__ import annotations

import sys

import pytest

from tests.slurm.jobs import ROOT, SMALL, START, Workplace, make_run, refused
from tests.slurm.lab.cluster import wait_for

pytestmark = pytest.mark.timeout(900)
NO_GPU = ("placement.gpu=h100", "placement.rollout_nodes=1")
"""Comes as far as the preflight, where no nvidia-smi lists the granted GPUs."""


@pytest.mark.parametrize(
    ("name", "export", "inherited"),
    [
        ("export_none", ["--export=NONE"], {}),
        ("export_some", [f"--export=GSPO_SITE=/dev/null,GSPO_VENV={sys.prefix}"], {}),
        ("export_by_environment", [], {"SBATCH_EXPORT": "NONE"}),
    ],
)
def test_what_sbatch_does_not_export_is_not_missed(
    workplace: Workplace, name: str, export: list[str], inherited: dict[str, str]
) -> None:
    if name != "export_some" and not (ROOT / ".venv").exists():
        pytest.skip("without its environment a job takes .venv of the checkout, which is not there; run make setup")
    said = refused(workplace.submit(name, *NO_GPU, options=["--nodes=2", *export], **inherited))
    for node in ("node1", "node2"):
        assert f"{node}: nvidia-smi lists 0 GPUs" in said, "the preflight must have run on both"


def test_a_node_with_other_packages_is_named_with_the_module_that_fails(workplace: Workplace) -> None:
    # /tmp is each node's own.
    lab, other = workplace.lab, "/tmp/packages-of-node2"
    package = "raise AttributeError(\"module 'aiohttp' has no attribute 'web'\")"
    lab.run(*lab.on("node2"), "bash", "-c", f'mkdir -p {other} && echo "$1" >{other}/aiohttp.py', "write", package)
    options = ["--nodes=2", "--nodelist=node[1-2]"]
    said = refused(workplace.submit("packages", *SMALL, "trainer.ranks=2", options=options, PYTHONPATH=other))
    assert "node2: `import gspo_megatron.controller.main` fails with AttributeError: module 'aiohttp' has no" in said
    assert "node1: `import" not in said


def test_each_fault_of_a_node_has_its_own_cure(workplace: Workplace) -> None:
    lab, run_dir = workplace.lab, make_run(workplace.directory / "faults")
    hosts = workplace.directory / "hosts_of_node2"
    hosts.write_text("127.0.0.1 localhost\n10.77.0.1 control\n10.77.0.11 node1\nfd00::12 node2\n")
    read_only = f"mount --bind {run_dir} {run_dir} && mount -o remount,bind,ro {run_dir}"
    disk = "mount -o remount,noexec /tmp && rm -rf /tmp/gspo-root && touch /tmp/gspo-root"
    change = f"{disk} && mount -o remount,size=64m /dev/shm && {read_only} && mount --bind {hosts} /etc/hosts"
    lab.run(*lab.on("node2"), "sh", "-c", change)
    try:
        options = ["--nodes=2", "--nodelist=node[1-2]"]
        said = refused(workplace.submit("faults", *SMALL, "trainer.ranks=2", options=options))
        lab.run(*lab.on("node2"), "umount", str(run_dir))
        again = refused(workplace.submit("again", *SMALL, "trainer.ranks=2", options=options, directory="faults"))
    finally:
        lab.run(
            *lab.on("node2"),
            "sh",
            "-c",
            "umount /etc/hosts; rm /tmp/gspo-root; mount -o remount,exec /tmp; mount -o remount,size=50% /dev/shm",
        )
    assert f"node2: {run_dir}/logs/attempt_1 cannot be written (Read-only file system); mount it writable" in said
    assert "node2: /dev/shm has 0.06 GiB free, 1 is needed; mount it larger" in again, again
    for text in (said, again):
        assert "node2: /tmp is mounted noexec, and compiled kernels" in text, text
        assert "node2: /tmp/gspo-root cannot be written (File exists); remove it" in text, text
        assert "node2: the name node2 has no IPv4 address (IPv6 only" in text, text
        assert "node1: " not in text and "Traceback" not in text, text


def test_a_mistake_in_the_site_file_is_the_log_s_last_line(workplace: Workplace) -> None:
    site = workplace.directory / "site.sh"
    site.write_text("# a site\nmodule load cuda\n")
    job = workplace.submit("site_file", *SMALL, options=["--nodes=1"], GSPO_SITE=str(site))
    refused(job)
    assert job.last_line().startswith(f"gspo: the site file {site}, line 2: `module load cuda`: command not found")


def test_of_two_array_tasks_on_one_run_directory_one_goes_on(workplace: Workplace) -> None:
    place = workplace.directory
    logs = [place / f"array-{task}.log" for task in range(2)]
    options = ["--nodes=1", "--array=0-1", f"--output={place}/array-%a.log"]
    job = workplace.cheap("array", "trainer.max_steps=3000", options=options)

    def texts() -> list[str]:
        return [log.read_text() if log.exists() else "" for log in logs]

    words = "all tasks of --array have the same run.directory"
    wait_for(lambda: any(words in text for text in texts()), START, "task that is refused")
    wait_for(lambda: list(job.attempt(1).glob("trainer-*.log")), START, "task that goes on")
    assert sum(words in text for text in texts()) == 1, texts()
    newest = (job.run_dir / "attempt").read_text()
    assert newest.startswith("1 ") and not job.attempt(2).exists(), "the task that runs must not be replaced"
    workplace.lab.run("scancel", str(job.id))
    wait_for(lambda: not (job.attempt(1) / "key").exists(), 120, "key that is removed")


def test_copies_that_a_user_keeps_in_the_run_directory_are_left_alone(workplace: Workplace) -> None:
    run_dir = make_run(workplace.directory / "copies")
    for name in ("checkpoints/step_000002_best", "logs/attempt_1_old"):
        (run_dir / name).mkdir(parents=True)
        (run_dir / name / "COMPLETE").touch()
    (run_dir / "attempt").touch()
    job = workplace.submit("copies", *NO_GPU, options=["--nodes=2"])
    assert f"warning: {run_dir}/attempt holds '', not the number of an attempt" in refused(job)
    assert job.attempt(1).is_dir() and (run_dir / "attempt").read_text().startswith(f"1 {job.id} ")
    assert (run_dir / "checkpoints" / "step_000002_best" / "COMPLETE").exists()
