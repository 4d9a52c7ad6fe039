"""A job whose steps are small processes, under stand-ins for scontrol and srun: only DONE is success."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

PROGRAM = """
import signal, sys
from pathlib import Path
from gspo_megatron.cluster import slurm_commands, slurm_words
from gspo_megatron.cluster.events import StopRequested, Watched
from gspo_megatron.cluster.slurm_allocation import Allocation
from gspo_megatron.cluster.slurm_backend import KINDS, Place, SlurmBackend
from gspo_megatron.cluster.supervisor import Rules, Supervisor, supervise
run_dir, grace, trainer = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
attempt = run_dir / "logs" / "attempt_1"
backend = SlurmBackend(Place("7", run_dir, attempt, 1, Allocation(("n1", "n2")), 2, 4))
signal.signal(signal.SIGUSR1, lambda *_: backend.signals.append(StopRequested()))
commands = {"rollout": ("sleep", "300"), "controller": ("sleep", "300"), "trainer": ("bash", "-c", trainer)}
slurm_commands.RETRY_SECONDS = slurm_words.CREATE_SECONDS = 0.1
rules = Rules(0.5, str(run_dir), True, 1, 0, grace, 0.5, 1, "sbatch again")
for kind in KINDS:
    backend.start(kind, commands[kind])
sys.exit(supervise(Supervisor([Watched(kind) for kind in KINDS], rules), backend))
"""
SCONTROL = """#!/bin/bash
if [ -n "${DOWN:-}" ] && [ ! -f $RUN/up ]; then touch $RUN/up; exit 1; fi
if [ "$1" = show ]; then
    echo "JobId=7 JobState=${STATE:-RUNNING} Requeue=${REQUEUE:-1} BatchFlag=${BATCH:-1} PreemptTime=${PREEMPTED:-None}"
elif [ -n "${REFUSES:-}" ]; then echo "slurm_requeue error: Requested operation is presently disabled" >&2; exit 1
else echo "scontrol $*"; kill -KILL $PPID; fi
"""
REQUEUED = -9
"""The stand-in for `scontrol requeue` ends the job, as the real one does."""
PRELUDE = f"""
checkpoint() {{
    {sys.executable} -c "import sys, pathlib, tests.checkpoints as c; c.write_checkpoint(pathlib.Path(sys.argv[1]))" \\
        "$RUN/checkpoints/step_$1"
}}
attempt=$RUN/logs/attempt_1
"""
READY = "for rank in 0 1; do echo trainer-$rank on n$rank '(10.0.0.1), process 7' >$attempt/trainer-n$rank.log; done"
"""What the tasks print when they hold the signal back; a shell ends here when it comes before its trap."""


def run(
    tmp_path: Path, trainer: str, newest: str = "1 7", grace: float = 240, **settings: str
) -> subprocess.CompletedProcess[str]:
    """The end of a job whose trainer step is this line of bash."""
    (tmp_path / "logs" / "attempt_1").mkdir(parents=True, exist_ok=True)
    (tmp_path / "attempt").write_text(newest + "\n")
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    alive = "exit 1" if settings.pop("lost", "") else "exit 0"
    for name, text in (("scontrol", SCONTROL), ("srun", f"#!/bin/bash\n{alive}\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:/usr/local/bin:/usr/bin:/bin"
    environment = {"PATH": path, "RUN": str(tmp_path), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **settings}
    command = (sys.executable, "-c", PROGRAM, str(tmp_path), str(grace), PRELUDE + trainer)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_srun_that_returns_0_is_no_success(tmp_path: Path) -> None:
    done = run(tmp_path, "true")
    assert done.returncode == 1, done
    assert "not restarted: there is no newer checkpoint than step 0" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("gspo: trainer failed: ")


def test_done_is_success_whatever_srun_returns(tmp_path: Path) -> None:
    done = run(tmp_path, "touch $RUN/DONE; exit 7")
    assert done.returncode == 0 and done.stdout.endswith(f"gspo: DONE; results are in {tmp_path}\n")


def test_a_crash_is_restarted_as_often_as_it_may_and_only_after_a_newer_checkpoint(tmp_path: Path) -> None:
    crash = "checkpoint 000003; echo 'srun: error: n1: task 0: Killed' >&2; exit 9"
    done = run(tmp_path, crash)
    assert done.returncode == REQUEUED and done.stdout.endswith("scontrol requeue 7\n"), done
    assert "gspo: trainer failed on n1: Killed" in done.stdout
    assert "restart 1 of at most 1, because a newer checkpoint exists (step 3)" in done.stdout
    done = run(tmp_path, crash)
    assert done.returncode == 1 and "1 restarts are used up" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("gspo: trainer failed on n1: Killed")


@pytest.mark.parametrize(("refusals", "code"), [(4, 0), (99, 1)])
def test_a_step_that_slurm_has_not_created_is_asked_for_again(tmp_path: Path, refusals: int, code: int) -> None:
    # Of a slurmctld that was just started.
    words = "srun: error: Unable to create step for job 7: Memory required by task is not available"
    trainer = f'echo >>$RUN/asked; [ "$(wc -l <$RUN/asked)" -gt {refusals} ] || {{ echo "{words}" >&2; exit 1; }}'
    done = run(tmp_path, f"{trainer}; touch $RUN/DONE")
    assert done.returncode == code and not (tmp_path / "logs" / "restarts").exists(), done
    assert len((tmp_path / "asked").read_text()) == (5 if code == 0 else 11)
    assert code == 0 or "Memory required by task is not available" in done.stdout.splitlines()[-1]


def test_the_last_words_are_those_of_the_role_and_not_of_slurm(tmp_path: Path) -> None:
    words = "'0: the reason' '0: ' '0: slurmstepd-n1: error: *** STEP 7.3 ON n1 CANCELLED ***'"
    ends = "echo 'srun: error: n1: task 0: Exited with exit code 1' >&2"
    done = run(tmp_path, f"printf '%s\\n' {words} >$attempt/trainer-n1.log; {ends}; exit 1")
    assert done.stdout.splitlines()[-1].startswith("gspo: trainer failed on n1: the reason (log: "), done


def test_the_last_words_are_those_of_the_task_that_ended_first(tmp_path: Path) -> None:
    words = "'0: not mine' '1: no progress for 121 s' '0: RuntimeError: Connection closed by peer'"
    ends = "echo 'srun: error: n1: task 1: Exited with exit code 1' >&2"
    done = run(tmp_path, f"printf '%s\\n' {words} >$attempt/trainer-n1.log; {ends}; exit 1")
    assert done.stdout.splitlines()[-1].startswith("gspo: trainer failed on n1: no progress for 121 s (log: "), done


def test_an_srun_that_was_killed_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "kill -KILL $$")
    assert done.stdout.splitlines()[-1].startswith("gspo: trainer failed: its srun was killed by SIGKILL (log: "), done


def test_a_job_of_salloc_is_not_queued_again_and_counts_no_restart(tmp_path: Path) -> None:
    done = run(tmp_path, "checkpoint 000003; exit 1", BATCH="0")
    assert "gspo: SLURM does not queue this job again; to go on: sbatch again" in done.stdout, done
    assert done.returncode == 85 and not (tmp_path / "logs" / "restarts").exists()


def test_what_srun_says_of_our_options_is_no_reason(tmp_path: Path) -> None:
    warning = "echo 'srun: cluster configuration lacks support for cpu binding' >&2"
    done = run(tmp_path, f"echo 'srun: error: Unable to create step' >&2; {warning}; exit 1")
    assert "gspo: trainer failed: srun: error: Unable to create step (srun ended with 1)" in done.stdout, done


def test_a_lost_node_is_a_reason_of_its_own(tmp_path: Path) -> None:
    done = run(tmp_path, "exit 1", lost="yes")
    assert done.returncode == REQUEUED and "because a node is lost" in done.stdout


def test_the_name_of_a_lost_node_is_reported(tmp_path: Path) -> None:
    done = run(tmp_path, "echo 'srun: error: Node failure on n2' >&2; exit 1", lost="yes")
    assert "gspo: trainer failed on n2: the node is lost (log: " in done.stdout


@pytest.mark.parametrize("meanwhile", ["checkpoint 000003", "touch $RUN/DONE"])
def test_a_replaced_attempt_ends_and_leaves_the_job_alone(tmp_path: Path, meanwhile: str) -> None:
    done = run(tmp_path, f"{meanwhile}; exit 1", newest="2 7")
    assert done.returncode == 1 and "scontrol" not in done.stdout, done
    assert done.stdout.splitlines()[-1] == "gspo: attempt 1 was replaced by attempt 2; this one ends"
    assert not (tmp_path / "logs" / "restarts").exists()


def test_it_waits_for_a_slurmctld_that_does_not_answer(tmp_path: Path) -> None:
    done = run(tmp_path, "checkpoint 000003; exit 1", DOWN="yes")
    assert "gspo: slurmctld does not answer; waiting for it" in done.stdout
    assert done.returncode == REQUEUED and "because a newer checkpoint exists" in done.stdout, done


@pytest.mark.parametrize(("requeue", "code", "end"), [("1", REQUEUED, "scontrol requeue 7"), ("0", 85, "sbatch again")])
def test_a_stop_as_asked_requeues_last_of_all(tmp_path: Path, requeue: str, code: int, end: str) -> None:
    (tmp_path / "logs" / "attempt_1").mkdir(parents=True)
    (tmp_path / "logs" / "attempt_1" / "key").write_text("secret")
    trainer = f"trap 'checkpoint 000002; exit 85' USR1; kill -USR1 $PPID; {READY}; while :; do sleep 0.1; done"
    done = run(tmp_path, trainer, REQUEUE=requeue)
    assert done.returncode == code, done
    assert "asked to stop (USR1)" in done.stdout
    assert "attempt 1 stopped as asked; step 2 is checkpointed" in done.stdout
    assert done.stdout.rstrip().endswith(end)
    assert not (tmp_path / "logs" / "restarts").exists(), "what was asked for is no crash"
    assert requeue == "0" or not (tmp_path / "logs" / "attempt_1" / "key").exists(), "SLURM ends the script here"


def test_a_job_that_slurm_does_not_queue_again_ends_and_says_how_to_go_on(tmp_path: Path) -> None:
    done = run(tmp_path, "checkpoint 000003; exit 1", REFUSES="yes")
    assert done.returncode == 85, done
    assert done.stdout.endswith("gspo: SLURM does not queue this job again; to go on: sbatch again\n")
    assert done.stderr.count("Requested operation is presently disabled") == 3


def test_a_trainer_that_is_still_starting_is_not_ended_by_the_stop(tmp_path: Path) -> None:
    trainer = f"kill -USR1 $PPID; sleep 2; trap 'checkpoint 000002; exit 85' USR1; {READY}; while :; do sleep 0.1; done"
    done = run(tmp_path, trainer)
    assert done.returncode == REQUEUED and "attempt 1 stopped as asked; step 2 is checkpointed" in done.stdout, done


def test_a_stop_without_a_checkpoint_within_the_grace_is_a_failure(tmp_path: Path) -> None:
    done = run(tmp_path, f"trap '' USR1; kill -USR1 $PPID; {READY}; sleep 30", grace=2)
    assert done.returncode == 1 and "no checkpoint within 2 s" in done.stdout


def test_what_a_user_keeps_in_the_run_directory_is_no_checkpoint_and_a_broken_attempt_file_is_a_sentence(
    tmp_path: Path,
) -> None:
    copy = tmp_path / "checkpoints" / "step_000009_best"
    copy.mkdir(parents=True)
    (copy / "COMPLETE").touch()
    (tmp_path / "checkpoints" / "step_9").mkdir()
    done = run(tmp_path, "checkpoint 000002; exit 1", newest="")
    assert done.returncode == REQUEUED and "a newer checkpoint exists (step 2)" in done.stdout, done
    assert f"gspo: {tmp_path}/attempt holds '\\n', not the number of an attempt and its job" in done.stdout
    assert os.listdir(copy) == ["COMPLETE"]


@pytest.mark.parametrize("checkpoint", ["", "checkpoint 000003; "])
@pytest.mark.parametrize(("requeue", "code", "end"), [("1", REQUEUED, "scontrol requeue 7"), ("0", 85, "sbatch again")])
def test_roles_that_a_preemption_ends_are_no_crash(
    tmp_path: Path, checkpoint: str, requeue: str, code: int, end: str
) -> None:
    crash = f"{checkpoint}echo 'srun: error: n1: task 0: Terminated' >&2; exit 143"
    done = run(tmp_path, crash, PREEMPTED="2026-11-30T06:33:15", REQUEUE=requeue)
    newest = 3 if checkpoint else 0
    assert done.returncode == code and f"SLURM preempts this job; {newest} is the newest" in done.stdout, done
    assert done.stdout.rstrip().endswith(end) and not (tmp_path / "logs" / "restarts").exists()


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "PREEMPTED", "TIMEOUT", "NODE_FAIL"])
def test_a_job_that_slurm_is_ending_is_not_counted_and_not_queued_again(tmp_path: Path, state: str) -> None:
    done = run(tmp_path, "checkpoint 000003; exit 1", STATE=state, PREEMPTED="2026-11-30T06:33:15")
    assert done.returncode == 143 and done.stdout.splitlines()[-1].startswith("gspo: SLURM ends this attempt"), done
    assert "scontrol requeue" not in done.stdout and not (tmp_path / "logs" / "restarts").exists()


def test_deleted_logs_do_not_hide_how_the_trainers_ended(tmp_path: Path) -> None:
    words = 'echo "srun: error: n1: task 0: Exited with exit code 85" >&2'
    ends = f"trap 'checkpoint 000002; rm -r $RUN/logs; {words}; exit 137' USR1"
    done = run(tmp_path, f"{ends}; kill -USR1 $PPID; {READY}; while :; do sleep 0.1; done")
    assert done.returncode == REQUEUED and "attempt 1 stopped as asked; step 2 is checkpointed" in done.stdout, done
    done = run(tmp_path, "checkpoint 000003; rm -r $RUN/logs; exit 9")
    assert done.returncode == REQUEUED and "restart 1 of at most 1" in done.stdout, done
    assert (tmp_path / "logs" / "restarts").read_text().count("\n") == 1


OTHERS = (
    "for name in rollout-0 controller; do echo $name on n1 '(10.0.0.1), process 8' >$attempt/${name%-*}-n1.log; done"
)


@pytest.mark.parametrize("starts", [f"{READY}; {OTHERS}", "checkpoint 000002"])
def test_the_key_goes_once_all_have_read_it_or_a_checkpoint_says_so(tmp_path: Path, starts: str) -> None:
    (tmp_path / "logs" / "attempt_1").mkdir(parents=True)
    (tmp_path / "logs" / "attempt_1" / "key").write_text("secret")
    done = run(tmp_path, f"{starts}; until [ ! -e $attempt/key ]; do sleep 0.05; done; touch $RUN/DONE")
    assert done.returncode == 0, done
