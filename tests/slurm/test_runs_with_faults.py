"""What a run does about faults of disks, networks, limits and SLURM itself: it ends DONE, and nothing is doubled.

Three scenarios, two at a time on one lab: much of their time is waiting for a watchdog, or for a node to be missed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.slurm.jobs import SMALL, START, Job, Workplace, check_done, make_run
from tests.slurm.lab.cluster import wait_for

pytestmark = pytest.mark.timeout(1800)
STEPS = 14
RUN = (*SMALL, f"trainer.max_steps={STEPS}")


@pytest.fixture(scope="module")
def scenarios(workplace: Workplace) -> Iterator[dict[str, Future[None]]]:
    """All of them at their end, good or bad; each test asks for its own."""
    lanes = ((stop_one_rank,), (cut_a_node_off, spoil_fill_and_truncate))
    ends: dict[str, Future[None]] = {scenario.__name__: Future() for lane in lanes for scenario in lane}
    with ThreadPoolExecutor(len(lanes)) as pool:
        for lane in lanes:
            pool.submit(run_lane, workplace, lane, ends)
    yield ends
    workplace.cancel_all()


def run_lane(place: Workplace, lane: tuple[Callable[[Workplace], None], ...], ends: dict[str, Future[None]]) -> None:
    earlier = len(place.jobs)
    for scenario in lane:
        try:
            scenario(place)
        except BaseException as error:
            for job in place.jobs[earlier:]:
                error.add_note(job.everything())
            ends[scenario.__name__].set_exception(error)
        else:
            ends[scenario.__name__].set_result(None)


def stop_one_rank(place: Workplace) -> None:
    """A rank is stopped in the middle of a save."""
    job = place.submit("hang", *RUN, options=["--nodes=1", "--nodelist=node1"])
    job.wait_for_step(1)
    stop_within_a_save(job, 1)
    whole = job.checkpointed()
    job.wait_for_words("no progress for")
    job.wait_for_attempt(2)
    half = list((job.run_dir / "checkpoints").glob(".step_*.partial"))
    assert half and not any((path / "COMPLETE").exists() for path in half), "the save must have been cut short"
    said = job.text()
    assert "gspo: trainer failed on node1: no progress for" in said and "trainer-1 is silent since" in said
    assert f"gspo: restart 1 of at most 3, because a newer checkpoint exists (step {whole})" in said
    check_stacks(job)
    check_done(job, STEPS)
    assert f"gspo: goes on after step {whole}\n" in job.text()
    assert not list((job.run_dir / "checkpoints").glob(".step_*.partial")), "the half-written one must be gone"


def stop_within_a_save(job: Job, rank: int) -> None:
    """SIGSTOP a rank while a checkpoint is half-written; a save that was quicker lets it go on until the next."""
    pid, checkpoints = job.rank(rank), job.run_dir / "checkpoints"
    while True:
        before = job.checkpointed()
        wait_for(lambda: list(checkpoints.glob(".step_*.partial")), START, "save", pause=0.0005)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.0)
        if list(checkpoints.glob(".step_*.partial")) and job.checkpointed() == before:
            return
        os.kill(pid, signal.SIGCONT)


def check_stacks(job: Job) -> None:
    """Every role of the first attempt has written where it stood."""
    said = {path.name.split("-")[0]: path.read_text() for path in job.attempt(1).glob("*-node1.log")}
    assert "stacks of trainer-0:" in said["trainer"] and "loop.py" in said["trainer"]
    assert "stacks of controller:" in said["controller"]
    assert "stacks of rollout-0:" in said["rollout"]
    assert " VLLM::EngineCore, " in said["rollout"], "the engine answers for itself"


def cut_a_node_off(place: Workplace) -> None:
    """The node of a run loses its network, SLURM runs the job elsewhere, and then the first attempt moves again."""
    lab = place.lab
    job = place.submit("cut_off", *RUN, options=["--nodes=1", "--exclude=node[1-2]"])
    job.wait_for_step(2)
    node = job.plan(1)["hosts"][0][0]
    with lab.cut_off(node):
        # It would be done before SLURM misses the node.
        with job.frozen():
            job.wait_for_attempt(2)
            before = job.checkpointed()
        assert job.plan(2)["hosts"][0][0] != node
        replaced = "attempt 1 was replaced by attempt 2"
        # Its srun asks for slurmctld first; attempt 2 may be done by then.
        wait_for(lambda: f"gspo: {replaced}; this one ends" in job.text(), START, "the script that was replaced")
    (log,) = job.attempt(1).glob("trainer-*.log")
    assert f"{replaced} of {job.run_dir}" in log.read_text()
    check_done(job, STEPS, afterwards=replaced)
    said = job.text()
    assert f"gspo: goes on after step {before}\n" in said
    assert lab.job(job.id)["Restarts"] == "1" and not (job.run_dir / "logs" / "restarts").exists(), "a second restart"
    wait_for(lambda: lab.idle_nodes() >= lab.nodes - 1, 180, "node that is back")


def spoil_fill_and_truncate(place: Workplace) -> None:
    """An update is no number, the disk gets full, and the newest checkpoint is truncated meanwhile."""
    run_dir, poison = place.directory / "limits", place.directory / "poison"
    disk = place.lab.disk
    make_run(run_dir)
    (run_dir / "checkpoints").symlink_to(disk)
    job = place.submit(
        "limits", *RUN, f"objective.trust={Path(__file__).with_name('poisoned.py')}:clip",
        options=["--nodes=1", "--nodelist=node2"], GSPO_TEST_POISON=str(poison),
    )  # fmt: skip
    job.wait_for_step(1)
    poison.touch()
    wait_for(lambda: job.rows()[-1].get("skipped_updates") == 1, START, "skipped update")
    assert not poison.exists()
    # One more, which is cut later.
    job.wait_for_step(job.steps()[-1] + 1)
    fill(disk, job)
    # The next attempt finds the newest checkpoint cut.
    whole = job.checkpointed()
    cut = disk / f"step_{whole:06d}" / "rank_00000.safetensors"
    os.truncate(cut, cut.stat().st_size // 2)
    (disk / "ballast").unlink()
    check_done(job, STEPS)
    said = job.text()
    assert "could not save: [Errno 28] No space left on device" in said and "gspo: restart 1 of at most 3" in said
    (log,) = job.attempt(2).glob("trainer-*.log")
    assert f"goes on after step {whole - 1} (" in log.read_text()
    assert {row["skipped_updates"] for row in job.rows()[-3:]} == {1}, "the one that was no number is counted once"
    assert len(list((run_dir / "alarms").glob("update_*"))) == 1


def fill(disk: Path, job: Job) -> None:
    """Leave no room for a checkpoint, and wait until a save has failed of it."""
    with (disk / "ballast").open("ab", buffering=0) as ballast:

        def failed() -> bool:
            # Again and again, because an older checkpoint may go; 1 MB is left for the names and state.json.
            left = os.statvfs(disk)
            ballast.write(bytes(max(0, left.f_bavail * left.f_frsize - (1 << 20))))
            return "No space left on device" in job.text()

        wait_for(failed, START, "save that fails")
    assert not list(disk.glob(".step_*.partial/*.unfinished")), "the unfinished file must be deleted"


@pytest.mark.parametrize("name", ["stop_one_rank", "cut_a_node_off", "spoil_fill_and_truncate"])
def test_a_run_comes_through(name: str, scenarios: dict[str, Future[None]]) -> None:
    scenarios[name].result()
