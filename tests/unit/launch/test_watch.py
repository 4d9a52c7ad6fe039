"""The verdict of `launch/lib/watch.sh` on a job whose roles are small processes: only DONE is success."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.places import ROOT

JOB = """
set -euo pipefail
run_dir=$1 attempt=$1/logs/attempt_1 hosts=(n1) SLURM_JOB_ID=7 GSPO_MAX_RESTARTS=1 resume="sbatch again"
declare -A plan=([number]=1 [trainer_hosts]=n1,n2 [trainer_each]=1) step=()
asked='' first='' code=0 started_from=0
echo "${NEWEST:-1} 7" >$run_dir/attempt
scontrol() {
    if [ -n "${DOWN:-}" ] && [ ! -f $run_dir/up ]; then touch $run_dir/up; return 1; fi
    if [ "$1" = show ]; then echo "JobId=7 Requeue=${REQUEUE:-1} X="; else echo "scontrol $*"; exit 99; fi
}
timeout() { [ -f $run_dir/up ] || [ "${DOWN:-}" = '' ] && [ "${LOST:-}" = '' ]; }
checkpoint() { mkdir -p "$run_dir/checkpoints/step_$1" && touch "$run_dir/checkpoints/step_$1/COMPLETE"; }
. launch/lib/watch.sh
trap on_usr1 USR1
for kind in rollout controller trainer; do touch "$attempt/srun-$kind.txt"; done
sleep 300 & step[rollout]=$!
sleep 300 & step[controller]=$!
"""
ENDS = "\nwatch_roles\nsettle\n"
REQUEUED = 99
"""Exit code that the stand-in for `scontrol requeue` ends the script with, as the real one does."""


SAY_SO = "for rank in 0 1; do echo trainer-$rank on n$rank '(10.0.0.1), process 7' >$attempt/trainer-n$rank.log; done"
"""What the tasks print when they hold the signal back; a shell ends here when it comes before its trap."""


def run(tmp_path: Path, trainer: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The verdict on a job whose trainer is this line of bash; `$!` in `step[trainer]` is its process."""
    (tmp_path / "logs" / "attempt_1").mkdir(parents=True, exist_ok=True)
    command = ("bash", "-c", JOB + trainer + " & step[trainer]=$!" + ENDS, "job", str(tmp_path))
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", **settings}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_srun_that_returns_0_is_no_success(tmp_path: Path) -> None:
    said = run(tmp_path, "true")
    assert said.returncode == 1, said
    assert "not restarted: there is no newer checkpoint than step 0" in said.stdout
    assert said.stdout.splitlines()[-1].startswith("gspo: trainer failed: ")


def test_done_is_success_whatever_srun_returns(tmp_path: Path) -> None:
    said = run(tmp_path, "(touch $run_dir/DONE; exit 7)")
    assert said.returncode == 0 and said.stdout.endswith(f"gspo: DONE; results are in {tmp_path}\n")


def test_a_crash_is_restarted_as_often_as_it_may_and_only_after_a_newer_checkpoint(tmp_path: Path) -> None:
    crash = "(checkpoint 000003; echo 'srun: error: n1: task 0: Killed' >$attempt/srun-trainer.txt; exit 9)"
    said = run(tmp_path, crash)
    assert said.returncode == REQUEUED and said.stdout.endswith("scontrol requeue 7\n"), said
    assert "gspo: trainer failed on n1: Killed" in said.stdout
    assert "restart 1 of at most 1, because a newer checkpoint exists (step 3)" in said.stdout
    said = run(tmp_path, crash)
    assert said.returncode == 1 and "1 restarts are used up" in said.stdout
    assert said.stdout.splitlines()[-1].startswith("gspo: trainer failed on n1: Killed")


def test_the_last_words_are_those_of_the_role_and_not_of_slurm(tmp_path: Path) -> None:
    words = "'0: the reason' '0: ' '0: slurmstepd-n1: error: *** STEP 7.3 ON n1 CANCELLED ***'"
    ends = "echo 'srun: error: n1: task 0: Exited with exit code 1' >$attempt/srun-trainer.txt"
    said = run(tmp_path, f"(printf '%s\\n' {words} >$attempt/trainer-n1.log; {ends}; exit 1)")
    assert said.stdout.splitlines()[-1].startswith("gspo: trainer failed on n1: the reason (log: "), said


def test_a_lost_node_is_a_reason_of_its_own(tmp_path: Path) -> None:
    said = run(tmp_path, "(exit 1)", LOST="yes")
    assert said.returncode == REQUEUED and "because a node is lost" in said.stdout


@pytest.mark.parametrize("meanwhile", ["checkpoint 000003", "touch $run_dir/DONE"])
def test_a_replaced_attempt_ends_and_leaves_the_job_alone(tmp_path: Path, meanwhile: str) -> None:
    said = run(tmp_path, f"({meanwhile}; exit 1)", NEWEST="2")
    assert said.returncode == 1 and "scontrol" not in said.stdout, said
    assert said.stdout.splitlines()[-1] == "gspo: attempt 1 was replaced by attempt 2; this one ends"
    assert not (tmp_path / "logs" / "restarts").exists()


def test_it_waits_for_a_slurmctld_that_does_not_answer(tmp_path: Path) -> None:
    said = run(tmp_path, "(checkpoint 000003; exit 1)", DOWN="yes")
    assert said.returncode == REQUEUED and "because a newer checkpoint exists" in said.stdout, said


@pytest.mark.parametrize(("requeue", "code", "end"), [("1", REQUEUED, "scontrol requeue 7"), ("0", 85, "sbatch again")])
def test_a_stop_as_asked_requeues_last_of_all(tmp_path: Path, requeue: str, code: int, end: str) -> None:
    # The script's own wait is ended early by the signal; the trainer answers a moment later.
    trainer = f"(trap 'checkpoint 000002; exit 85' USR1; kill -USR1 $$; {SAY_SO}; while :; do sleep 0.1; done)"
    said = run(tmp_path, trainer, REQUEUE=requeue)
    assert said.returncode == code, said
    assert "asked to stop (USR1)" in said.stdout and "attempt 1 stopped as asked; step 2 is checkpointed" in said.stdout
    assert said.stdout.rstrip().endswith(end)
    assert not (tmp_path / "logs" / "restarts").exists(), "what was asked for is no crash"


def test_a_trainer_that_has_only_begun_to_start_is_not_ended_by_the_stop(tmp_path: Path) -> None:
    trainer = f"(kill -USR1 $$; sleep 2; trap 'checkpoint 000002; exit 85' USR1; {SAY_SO}; while :; do sleep 0.1; done)"
    said = run(tmp_path, trainer)
    assert said.returncode == REQUEUED and "attempt 1 stopped as asked; step 2 is checkpointed" in said.stdout, said


def test_a_stop_without_a_checkpoint_within_the_grace_is_a_failure(tmp_path: Path) -> None:
    trainer = f"(trap '' USR1; kill -USR1 $$; {SAY_SO}; sleep 30)"
    said = run(tmp_path, trainer, GSPO_GRACE="2")
    assert said.returncode == 1 and "no checkpoint within 2 s" in said.stdout
