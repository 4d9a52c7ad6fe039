"""What people and SLURM do to one job while it runs, and what its environment has inherited."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.slurm.jobs import CHEAP, END, LAST, ROOT, SCRIPT, SMALL, START, TINY, Job, Workplace, make_run
from tests.slurm.lab.cluster import wait_for
from tests.slurm.lanes import Scenarios

pytestmark = pytest.mark.timeout(1800)
SCENARIOS, ELSEWHERE = Scenarios(), Scenarios()
"""On the lab of all, and on one of its own, whose slurmctld may go."""
ENDLESS = ("trainer.max_steps=100000", "checkpoint.every=2")
INHERITED = {
    "SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "node5", "SLURM_JOB_NODELIST_HET_GROUP_1": "node6",
    "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0": "192", "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1": "192",
}  # fmt: skip


def start(workplace: Workplace, name: str, *options: str, **environment: str) -> Job:
    job = workplace.cheap(name, *ENDLESS, options=["--nodes=1", *options], **environment)
    job.wait_for_step(2)
    return job


# The longest case is the first: SLURM looks at time limits twice a minute.
@SCENARIOS.add
def a_time_limit_with_and_without_a_warning(workplace: Workplace) -> None:
    job = start(workplace, "limit")
    with job.frozen():
        # SLURM sends USR1 when 300 s are left, and up to a minute earlier.
        job.set_limit(job.minutes() + 5)
        job.wait_for_words("gspo: asked to stop (USR1)")
    job.wait_for_words("gspo: attempt 1 stopped as asked; step")
    job.wait_for_attempt(2)
    job.set_limit(240)
    # It may have stopped after a step of an odd number; it saves itself after even ones.
    job.wait_for_step(2 * (job.checkpointed() // 2 + 1))
    with job.frozen():
        job.set_limit(1)
        assert job.finish(END) == "TIMEOUT"
    ends = "gspo: SLURM ends this attempt (scancel, a lost node, or its limit)"
    whole = job.checkpointed()
    assert f"{ends}; {whole} is the newest complete checkpoint" in job.text()
    resumed = workplace.resume(job, "limit_resumed", PYTHONPATH=str(CHEAP))
    resumed.wait_for_words(f"gspo: goes on after step {whole}")
    resumed.wait_for_attempt(3)


@SCENARIOS.add
def what_people_do_to_a_run_directory_meanwhile(workplace: Workplace) -> None:
    job = workplace.cheap("touched", f"trainer.max_steps={LAST}", options=["--nodes=1"])
    job.wait_for_step(2, END)
    checkpoints, logs = job.run_dir / "checkpoints", job.run_dir / "logs"
    subprocess.run(("cp", "-r", checkpoints / "step_000002", checkpoints / "step_000002_best"), check=True)
    (checkpoints / "step_999").mkdir()
    (logs / "attempt_1_old").mkdir()
    (logs / "attempt_007").mkdir()
    (job.run_dir / "attempt").write_text("")
    job.lab.run("scancel", "--batch", "--signal=USR1", str(job.id))
    assert job.finish(END) == "COMPLETED" and (job.run_dir / "DONE").exists(), job.everything()
    assert "holds '', not the number of an attempt" in job.text() and "Traceback" not in job.text()
    assert (checkpoints / "step_000002_best" / "COMPLETE").exists() and (logs / "attempt_007").is_dir()
    assert sorted(set(job.steps())) == list(range(1, LAST + 1)) and job.attempt(2).is_dir()


@SCENARIOS.add
def a_slow_file_system_that_is_stale_once(workplace: Workplace) -> None:
    run_dir, stale = workplace.directory / "stale", workplace.directory / "tokens"
    stale.mkdir()
    for name in ("attempt", "plan.json", "key", "COMPLETE", "job"):
        (stale / name).touch()
    slow = {"LD_PRELOAD": str(workplace.lab.slow_files), "SLOW_DIR": str(run_dir), "SLOW_MICROSECONDS": "20000"}
    overrides = (f"trainer.max_steps={LAST}", "checkpoint.every=1")
    job = workplace.cheap("stale", *overrides, options=["--nodes=1"], STALE_DIR=str(stale), **slow)
    job.wait_for_step(2, END)
    assert list(stale.iterdir()) != [], "the file attempt is looked at later"
    job.lab.run("scancel", "--batch", "--signal=USR1", str(job.id))
    assert job.finish(END) == "COMPLETED" and (job.run_dir / "DONE").exists(), job.everything()
    assert not {"attempt", "plan.json", "key", "COMPLETE"} & {path.name for path in stale.iterdir()}
    assert "Traceback" not in job.everything()


@SCENARIOS.add
def a_stop_of_an_array_s_last_task_leaves_its_siblings_alone(workplace: Workplace) -> None:
    lab, place = workplace.lab, workplace.directory
    tools = {"GSPO_SITE": "/dev/null", "GSPO_VENV": sys.prefix, "PYTHONPATH": str(CHEAP)}
    (place / "tasks").mkdir()
    words = (*SMALL, *ENDLESS, f"cold_start.cache={workplace.cold_start}")
    options = ("--nodes=1", "--array=0-1", f"--output={place}/tasks-%a.log")
    number = lab.submit(*options, str(ROOT / SCRIPT), str(ROOT / TINY), *words, environment=tools, cwd=place / "tasks")
    tasks = [Job(lab, number, place / "tasks", place / f"tasks-{task}.log") for task in (0, 1)]
    workplace.jobs.append(tasks[0])
    for task in tasks:
        task.wait_for_words("follow ")
    wait_for(lambda: len(list((place / "tasks").glob("runs/*/checkpoints/step_*/COMPLETE"))) > 3, START, "checkpoints")
    lab.run("scancel", "--batch", "--signal=USR1", f"{number}_1")
    tasks[1].wait_for_words("stopped as asked; step")
    tasks[1].wait_for_words(", start 2, on ")
    assert ", start 2, on " not in tasks[0].text() and "REQUEUE" not in tasks[0].text()


@SCENARIOS.add
def the_run_of_a_stopped_job_is_not_taken_over(workplace: Workplace) -> None:
    job = start(workplace, "stopped")
    workplace.lab.run("scancel", "--signal=STOP", str(job.id))
    wait_for(lambda: workplace.lab.job(job.id)["JobState"] != "RUNNING", END, "stopped job")
    output, array = f"--output={workplace.directory}/second.log", {"SLURM_ARRAY_JOB_ID": "7"}
    other = workplace.cheap("stopped", *ENDLESS, options=["--nodes=1", output], **array)
    assert other.finish(END) == "FAILED" and other.exit_code() == 2
    assert f"job {job.id} is running in {job.run_dir}" in (text := (workplace.directory / "second.log").read_text())
    assert "--array" not in text, "that is its parent's"


@SCENARIOS.add
def an_interrupt_of_a_user_ends_the_roles_too(workplace: Workplace) -> None:
    send(workplace, "INT")


@SCENARIOS.add
def a_hangup_of_a_user_ends_the_roles_too(workplace: Workplace) -> None:
    send(workplace, "HUP")


def send(workplace: Workplace, name: str) -> None:
    job = start(workplace, f"by_{name}")
    workplace.lab.run("scancel", "--batch", f"--signal={name}", str(job.id))
    assert job.finish(END) == "FAILED"
    assert job.last_line().startswith(f"gspo: ended by SIG{name}; to go on: sbatch ")
    assert not (job.attempt(1) / "key").exists()


@SCENARIOS.add
def a_node_that_slurm_no_longer_knows_does_not_cancel_the_exclusions(workplace: Workplace) -> None:
    job = start(workplace, "gone_node", "--nodelist=node1")
    bad = "node17 GPU-3 is gone (attempt 1)\nnode[5-6] by hand\nnode4\n"
    (job.run_dir / "logs" / "bad_nodes").write_text(bad)
    workplace.lab.run("scancel", "--batch", "--signal=USR1", str(job.id))
    job.wait_for_words("gspo: not excluded, because SLURM knows no such node: node17")
    wait_for(lambda: workplace.lab.job(job.id)["ExcNodeList"] == "node5,node6,node4", END, "excluded node")


@SCENARIOS.add
def a_log_that_somebody_clears_does_not_swallow_the_stop(workplace: Workplace) -> None:
    job = start(workplace, "cleared")
    for log in job.attempt(1).glob("trainer-*.log"):
        log.write_text("")
    workplace.lab.run("scancel", "--batch", "--signal=USR1", str(job.id))
    job.wait_for_words("gspo: attempt 1 stopped as asked; step")
    assert "no checkpoint within" not in job.text()


@SCENARIOS.add
def variables_of_a_heterogeneous_parent_do_not_count(workplace: Workplace) -> None:
    job = workplace.cheap("child", "trainer.max_steps=2", options=["--nodes=1", "--nodelist=node1"], **INHERITED)
    assert job.finish(END) == "COMPLETED" and [host for host, _ in job.plan(1)["hosts"]] == ["node1"]


@SCENARIOS.add
def several_tasks_of_an_srun_are_refused(workplace: Workplace) -> None:
    place = workplace.directory
    script, log = place / "wrapper.sh", place / "wrapper.log"
    words = shlex.join([*SMALL, f"run.directory={place}/wrapped"])
    script.write_text(f"#!/bin/bash\ncd {ROOT}\nsrun {SCRIPT} {TINY} {words}\n")
    number = workplace.lab.submit("--ntasks=2", "--nodes=1", f"--output={log}", str(script))
    assert workplace.lab.wait(number, END)["JobState"] == "FAILED"
    assert "gspo: 2 tasks of an srun run this script; call it without srun" in log.read_text()
    assert not (place / "wrapped").exists()


@SCENARIOS.add
def a_copy_of_a_run_that_is_running_is_a_run_of_its_own(workplace: Workplace) -> None:
    job = start(workplace, "copied", "--nodelist=node1")
    copy = workplace.directory / "the_copy"
    # A checkpoint may be on its way out meanwhile; what cp could not read is not in the copy.
    subprocess.run(("cp", "-r", job.run_dir, copy), check=False, capture_output=True)
    options = ["--nodes=1", "--nodelist=node2"]
    other = workplace.cheap("the_copy", "trainer.max_steps=100001", "checkpoint.every=2", options=options)
    newest = other.checkpointed()
    other.wait_for_step(newest + 2)
    assert not list(other.run_dir.glob("logs/attempt_1/key")) and "is running in" not in other.text()


@SCENARIOS.add
def logs_that_somebody_deletes_do_not_swallow_the_stop(workplace: Workplace) -> None:
    job = start(workplace, "deleted")
    shutil.rmtree(job.run_dir / "logs")
    workplace.lab.run("scancel", "--batch", "--signal=USR1", str(job.id))
    job.wait_for_words("gspo: attempt 1 stopped as asked; step")
    wait_for(lambda: (job.run_dir / "attempt").read_text().startswith(f"2 {job.id} "), START, "attempt 2")
    assert "Traceback" not in job.text() and "no checkpoint within" not in job.text()


@SCENARIOS.add
def a_crash_after_the_logs_are_gone_is_still_counted(workplace: Workplace) -> None:
    job = start(workplace, "crashed")
    shutil.rmtree(job.run_dir / "logs")
    (job.run_dir / "CRASH").touch()
    job.wait_for_words("gspo: restart 1 of at most 3, because a newer checkpoint exists")
    job.wait_for_attempt(2)
    assert len((job.run_dir / "logs" / "restarts").read_text().splitlines()) == 1 and "Traceback" not in job.text()


@SCENARIOS.add
def restarts_that_become_a_directory_are_one_sentence(workplace: Workplace) -> None:
    replace_by_directory(workplace, "restarts")


@SCENARIOS.add
def an_attempt_file_that_becomes_a_directory_is_one_sentence(workplace: Workplace) -> None:
    replace_by_directory(workplace, "attempt")


def replace_by_directory(workplace: Workplace, name: str) -> None:
    job = start(workplace, f"became_{name}")
    place = job.run_dir / ("logs" if name == "restarts" else "") / name
    place.unlink(missing_ok=True)
    place.mkdir()
    key = job.attempt(1) / "key"
    key.unlink(missing_ok=True)
    key.mkdir()
    (job.run_dir / "CRASH").touch()
    assert job.finish(END) == "FAILED"
    place.rmdir()
    key.rmdir()
    assert "Traceback" not in job.text(), job.text()
    if name == "restarts":
        assert f"gspo: {place} cannot be used (Is a directory); correct that, then: sbatch " in job.text()
    else:
        assert f"gspo: {place} cannot be read (Is a directory)" in job.text()


@SCENARIOS.add
def a_crash_without_a_newer_checkpoint_is_not_restarted(workplace: Workplace) -> None:
    (make_run(workplace.directory / "early") / "CRASH").touch()
    job = workplace.cheap("early", *ENDLESS, options=["--nodes=1"])
    assert job.finish(END) == "FAILED" and job.exit_code() == 1
    assert "gspo: not restarted: there is no newer checkpoint than step 0" in job.text()
    assert job.last_line().startswith("gspo: trainer failed on node"), job.last_line()
    assert ": a file CRASH is there (log: " in job.last_line(), "the role's own words say more than its exit code"


@SCENARIOS.add
def the_key_is_no_longer_there_when_the_script_is_killed(workplace: Workplace) -> None:
    job = start(workplace, "killed")
    wait_for(lambda: not (job.attempt(1) / "key").exists(), END, "key that every role has read")
    workplace.lab.run("scancel", "--batch", "--signal=KILL", str(job.id))
    assert job.finish(END) == "FAILED" and not (job.attempt(1) / "key").exists()


@ELSEWHERE.add
def no_more_crashes_than_it_may_also_where_slurmctld_is_down(workplace: Workplace) -> None:
    job = start(workplace, "crashes", "--nodelist=node1", "--gpus-per-node=0", GSPO_MAX_RESTARTS="1")
    with workplace.lab.without_controller():
        # The only task of its step: srun cannot end other tasks without slurmctld.
        job.kill("rollout", "node1")
        job.wait_for_words("gspo: slurmctld does not answer; waiting for it")
    job.wait_for_attempt(2)
    job.wait_for_step(max(job.steps()) // 2 * 2 + 4)
    assert "gspo: rollout failed on node1: Killed" in job.text()
    # Just after slurmctld is back its nodes may not answer yet, and count as lost.
    assert "gspo: restart 1 of at most 1, because " in job.text()
    job.kill("trainer", "node1")
    assert job.finish(END) == "FAILED" and job.exit_code() == 1
    assert "gspo: not restarted: 1 restarts are used up" in job.text()
    assert job.last_line().startswith("gspo: trainer failed on node1: Killed"), job.last_line()
    assert len((job.run_dir / "logs" / "restarts").read_text().splitlines()) == 1
    assert not list(job.run_dir.glob("logs/attempt_*/key"))
    resumed = workplace.resume(job, "crashes_resumed", PYTHONPATH=str(CHEAP))
    resumed.wait_for_words("gspo: goes on after step")
    resumed.wait_for_attempt(3)


@pytest.fixture(scope="module")
def ends(workplace: Workplace, bare: Workplace) -> dict[str, Future[None]]:
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(ELSEWHERE.run, bare)
        return {**SCENARIOS.run(workplace), **elsewhere.result()}


@pytest.mark.parametrize("name", [*SCENARIOS.functions, *ELSEWHERE.functions])
def test_meanwhile(name: str, ends: dict[str, Future[None]]) -> None:
    ends[name].result()
