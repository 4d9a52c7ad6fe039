"""The job script's own part: its arguments, the lines it prints, who holds the run directory, the key."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.cluster import slurm_commands
from gspo_megatron.cluster.attempts import read_attempt, remove_key, replacement
from gspo_megatron.cluster.exit_codes import FAILED, REFUSED
from gspo_megatron.cluster.slurm_allocation import Allocation
from gspo_megatron.cluster.slurm_steps import Step
from gspo_megatron.config import RecipeError
from gspo_megatron.directory_lock import MARK
from gspo_megatron.own_directory import RUN as RUN_KIND
from gspo_megatron.own_directory import claim_directory, hold_directory
from gspo_megatron.run_dir import RunDir
from launch import job as script
from launch.lib import attempt as files
from launch.lib import job_arguments
from launch.lib.attempt import claim_attempt, write_key
from launch.lib.granted_job import Job, print_commands
from launch.lib.job_arguments import FLAGSHIP, read_arguments
from launch.lib.plan import load_for_job, make_attempt
from launch.lib.plan_request import Plan, Refused, ask_plan, in_trainer
from launch.lib.probe import find_broken_modules
from launch.lib.resume import refuse_other_job
from launch.lib.settings import Settings
from tests.places import ROOT

RECIPE = "recipes/tiny_moe.yaml"


def newest_of(run_dir: Path) -> tuple[int, str]:
    newest = read_attempt(run_dir)
    assert newest is not None
    return newest.number, newest.job


def plan_of(run_dir: Path, number: int, earlier: tuple[str, ...] = ()) -> Plan:
    return Plan(run_dir, 0, False, {}, False, run_dir / "logs" / f"attempt_{number}", number, earlier)


def test_the_resume_line_names_the_run_directory_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path / "a run", 1)
    arguments = (RECIPE, "run.directory=one", "data.options={min_digits: 1}", "run.directory=two")
    resume = print_commands(Job("7", ("n1",), 4, options=("--gpus-per-node=4",)), plan, arguments, plan.attempt, ROOT)
    assert shlex.split(resume) == [
        "sbatch", "--nodes=1", "--gpus-per-node=4", "launch/gspo_moe.sh", RECIPE, "data.options={min_digits: 1}",
        f"run.directory={tmp_path}/a run",
    ]  # fmt: skip
    assert f"resume      {resume}\n" in capsys.readouterr().out


def test_a_job_submitted_from_elsewhere_resumes_with_the_same_relative_paths(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "runs" / "a", 1)
    resume = print_commands(Job("7", ("n1",), 8), plan, (RECIPE, "data.path=mine.jsonl"), plan.attempt, tmp_path)
    assert shlex.split(resume) == [
        "sbatch", "--nodes=1", f"--chdir={tmp_path}", str(ROOT / "launch" / "gspo_moe.sh"), RECIPE,
        "data.path=mine.jsonl", f"run.directory={tmp_path}/runs/a",
    ]  # fmt: skip


def test_the_plan_of_a_job_takes_relative_paths_from_where_it_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def answer(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 2, "")

    monkeypatch.setattr("launch.lib.plan_request.subprocess.run", answer)
    monkeypatch.setenv("GSPO_IMAGE", "")
    with pytest.raises(Refused):
        ask_plan("open", Settings.read(ROOT, tmp_path), "7", ("n1",), 0, (RECIPE,))
    assert asked[0][asked[0].index("--called-in") + 1] == str(tmp_path)
    recipe = load_for_job(Path(RECIPE), ["data.path=a", "placement.gpu=cpu"], "7", ["n1"], 0, tmp_path)
    assert (recipe.data.path, recipe.run.directory) == (tmp_path / "a", tmp_path / "runs" / "tiny_moe-7")


def test_an_image_sees_the_checkout_and_where_the_job_was_submitted(tmp_path: Path) -> None:
    for called_in, mounts in (
        (ROOT / "recipes", f"{ROOT}:{ROOT},/a:/b"),
        (tmp_path, f"{ROOT}:{ROOT},{tmp_path}:{tmp_path},/a:/b"),
    ):
        images = {"trainer": "image", "rollout": "image"}
        settings = Settings(ROOT, called_in, {"trainer": ".venv", "rollout": ".venv"}, images, "/a:/b", 3, 240.0)
        assert f"--container-mounts={mounts}" in settings.container("trainer")


def test_an_image_without_python_is_named(tmp_path: Path) -> None:
    settings = Settings(ROOT, ROOT, {}, {"trainer": "image"}, "", 3, 240.0, allocation=Allocation(("n1",)))
    words = in_trainer(settings, "n1", ("-c", "print(7)"))
    words = words[words.index("/bin/sh") :]
    missing = "the image of GSPO_IMAGE has no python3 on its PATH"
    for path, said in ((tmp_path, missing), (Path(sys.prefix, "bin"), "7")):
        done = subprocess.run(words, env={"PATH": f"{path}"}, capture_output=True, text=True)
        assert said in done.stdout + done.stderr and done.returncode == (2 if path == tmp_path else 0)


def test_without_arguments_the_flagship_runs_and_a_recipe_of_the_caller_is_found(tmp_path: Path) -> None:
    assert read_arguments((), ROOT).recipe == FLAGSHIP
    (tmp_path / "mine.yaml").touch()
    found = read_arguments(("mine.yaml", "--dry-run", "--nodes=3", "a.b=c=d"), tmp_path)
    assert (found.recipe, found.nodes, found.overrides) == (str(tmp_path / "mine.yaml"), 3, ("a.b=c=d",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--dry-run", "--nodes=0"), "--nodes=0 is no number of nodes; write for example --nodes=4"),
        (("--dry-run", "--nodes=99999999"), "--nodes=99999999 is no number of nodes"),
        (("--dry-run", "--nodes="), "--nodes= is no number of nodes"),
        (("--dry-run", "--nodes"), "--nodes is no number of nodes"),
        (("--dry-run", "--gpus-per-node=few"), "--gpus-per-node=few is no number of gpus-per-node"),
        (("--nodes=4",), "--nodes=4 after the script is of --dry-run; sbatch's own options go before the script"),
    ],
)
def test_sizes_that_are_none_or_would_not_count_are_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(Refused, match=re.escape(said)):
        read_arguments(words, ROOT)


def test_two_jobs_that_start_in_one_second_get_different_attempts_and_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / "logs"
    (logs / "attempt_1_old").mkdir(parents=True)
    first, second = make_attempt(RunDir(tmp_path), "7"), make_attempt(RunDir(tmp_path), "8")
    assert first == (1, logs / "attempt_1", []) and second == (2, logs / "attempt_2", ["7"])
    monkeypatch.setattr(files, "running_jobs", lambda: ["7", "8"])
    claim_attempt(plan_of(tmp_path, 1), "7")
    with pytest.raises(Refused, match=r"job 7 is running in .*; wait for it .*singleton.*, or `scancel 7` first"):
        claim_attempt(plan_of(tmp_path, 2, ("7",)), "8")
    assert newest_of(tmp_path) == (1, "7"), "the first must not be replaced"
    assert not second[1].exists() and (logs / "latest").resolve() == first[1]
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    third = make_attempt(RunDir(tmp_path), "9")
    with pytest.raises(Refused, match=r"all tasks of --array have the same run.directory; .*--array=0-3%1"):
        claim_attempt(plan_of(tmp_path, third[0], ("7",)), "9")
    assert (logs / "attempt_1_old").is_dir()


def test_a_job_that_has_ended_or_is_started_again_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_attempt(RunDir(tmp_path), "6")
    make_attempt(RunDir(tmp_path), "7")
    number, _, earlier = make_attempt(RunDir(tmp_path), "7")
    monkeypatch.setattr(files, "running_jobs", lambda: ["7"])
    claim_attempt(plan_of(tmp_path, number, tuple(earlier)), "7")
    assert newest_of(tmp_path) == (3, "7")


def test_the_key_is_readable_by_the_user_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_key(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600 and len((tmp_path / "key").read_text()) == 32
    remove_key(tmp_path)
    remove_key(tmp_path)
    assert not (tmp_path / "key").exists()


@pytest.mark.parametrize(
    ("directory", "said"),
    [
        ("/proc/run", ("cannot-write", "cannot be written (")),
        ("/dev/null/run", ("directory-not-ours", "lies in /dev/null, which is not a directory")),
    ],
)
@pytest.mark.parametrize("command", ["train", "job"])
def test_a_run_directory_that_cannot_be_written_is_one_sentence(
    command: str, directory: str, said: tuple[str, str]
) -> None:
    words = (RECIPE, "placement.gpu=cpu", f"run.directory={directory}")
    job = ("launch.lib.plan", "open", "--job", "7", "--hosts", "n1", "--gpus", "0", *words)
    train = ("gspo_megatron.cli", "train", *words)
    done = subprocess.run(
        [sys.executable, "-m", *(train if command == "train" else job)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == REFUSED, done
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error [")]
    code, words = said
    assert f"error [{code}] run.directory: {directory}" in sentence and words in sentence
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["4m", "-1", "\N{SUPERSCRIPT TWO}", "1.5", " 4"])
def test_a_number_that_is_none_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("GSPO_GRACE", text)
    with pytest.raises(ValueError, match=f"GSPO_GRACE={text} is not a whole number; correct it in the site file"):
        Settings.read(ROOT, ROOT)


@pytest.mark.parametrize("name", ["a,b", "a:b"])
def test_a_directory_that_pyxis_would_cut_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    Settings.read(ROOT, tmp_path / name)
    monkeypatch.setenv("GSPO_ROLLOUT_IMAGE", "/images/vllm.sqsh")
    with pytest.raises(ValueError, match=f"/{name} holds a comma or a colon, which pyxis reads as the end of a path"):
        Settings.read(ROOT, tmp_path / name)


def test_a_package_that_cannot_be_imported_is_a_fault_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("raise AttributeError('module has no attribute web')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("launch.lib.probe.MODULES", {"trainer": ("json", "broken_package", "absent_package")})
    broken, absent = find_broken_modules("trainer")
    assert broken.startswith(
        "`import broken_package` fails with AttributeError: module has no attribute web; give this"
    )
    assert absent.startswith("`import absent_package` fails with ModuleNotFoundError: ")


@pytest.mark.parametrize("gpu", ["null", "h100"])
def test_a_run_that_is_meant_for_gpus_does_not_go_on_without(tmp_path: Path, gpu: str) -> None:
    with pytest.raises(RecipeError, match=r"\[no-gpus\] placement.gpu: .*GSPO_GPUS_PER_NODE.*placement.gpu=cpu"):
        load_for_job(Path(RECIPE), [f"placement.gpu={gpu}"], "7", ["n1"], 0, tmp_path)
    assert load_for_job(Path(RECIPE), ["placement.gpu=cpu"], "7", ["n1"], 8, tmp_path).placement.gpu == "cpu"


@pytest.mark.parametrize(("line", "gpus"), [("--gpus-per-node=h100:4", 4), ("--gres=gpu:8", 8), ("", 8)])
def test_a_site_may_change_the_script_s_own_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, gpus: int
) -> None:
    changed = tmp_path / "gspo_moe.sh"
    changed.write_text(
        job_arguments.SCRIPT.read_text().replace("#SBATCH --gpus-per-node=8", f"#SBATCH {line}" if line else "")
    )
    monkeypatch.setattr(job_arguments, "SCRIPT", changed)
    assert read_arguments((), ROOT).gpus == gpus


def test_arguments_of_the_site_reach_every_srun_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSPO_SRUN_ARGS", "--mpi=pmix --comment='two words'")
    words = Settings.read(ROOT, ROOT).srun(Step("trainer", ("n1",)), ("true",))
    assert words[-3:] == ["--mpi=pmix", "--comment=two words", "true"]
    monkeypatch.setenv("GSPO_SRUN_ARGS", "--comment='two")
    with pytest.raises(ValueError, match=r"GSPO_SRUN_ARGS=--comment='two cannot be read \(No closing quotation\)"):
        Settings.read(ROOT, ROOT)


def test_the_key_of_a_job_that_runs_is_not_removed_by_one_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first, _ = make_attempt(RunDir(tmp_path), "7")
    write_key(first)
    number, second, earlier = make_attempt(RunDir(tmp_path), "8")
    assert (first / "key").exists(), "the first job's roles may not have read it yet"
    monkeypatch.setattr(files, "running_jobs", lambda: ["7", "8"])
    with pytest.raises(Refused):
        claim_attempt(plan_of(tmp_path, number, tuple(earlier)), "8")
    assert (first / "key").exists() and not second.exists()
    monkeypatch.setattr(files, "running_jobs", lambda: ["9"])
    number, _, earlier = make_attempt(RunDir(tmp_path), "9")
    claim_attempt(plan_of(tmp_path, number, tuple(earlier)), "9")
    assert not (first / "key").exists(), "its job is gone"


def test_a_run_that_a_process_holds_which_slurm_does_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_directory(tmp_path, RUN_KIND, "run.directory")
    assert (tmp_path / MARK).is_file()
    monkeypatch.setattr(files, "running_jobs", lambda: ["7"])
    number, first, _ = make_attempt(RunDir(tmp_path), "7")
    lock = claim_attempt(plan_of(tmp_path, number), "7")
    assert lock is not None
    # A second script in the same allocation.
    number, second, _ = make_attempt(RunDir(tmp_path), "7")
    with pytest.raises(Refused, match="another script writes"):
        claim_attempt(plan_of(tmp_path, number), "7")
    assert first.exists() and not second.exists() and newest_of(tmp_path)[0] == 1
    with pytest.raises(RecipeError, match="directory-in-use"), hold_directory(tmp_path, "run.directory"):
        pass
    # The job was queued again, and its first node is cut off.
    number, _, _ = make_attempt(RunDir(tmp_path), "7")
    assert claim_attempt(plan_of(tmp_path, number), "7", is_first=False) is None and newest_of(tmp_path)[0] == 2
    lock.close()
    number, _, _ = make_attempt(RunDir(tmp_path), "7")
    assert claim_attempt(plan_of(tmp_path, number), "7") is not None


def test_no_answer_of_slurm_does_not_mean_that_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm_commands, "RETRY_SECONDS", 0.0)
    answers = [None, None, ["7", "8"]]
    monkeypatch.setattr(files, "running_jobs", lambda: answers.pop(0))
    make_attempt(RunDir(tmp_path), "7")
    number, _, earlier = make_attempt(RunDir(tmp_path), "8")
    with pytest.raises(Refused, match="job 7 is running"):
        claim_attempt(plan_of(tmp_path, number, tuple(earlier)), "8")
    assert capsys.readouterr().out.count("slurmctld does not answer; waiting for it") == 1
    monkeypatch.setattr(slurm_commands, "SLURM_SECONDS", -1.0)
    with pytest.raises(Refused, match="slurmctld does not answer, so it is not known what runs; submit again"):
        files.wait_for_slurm(lambda: None)


def test_a_directory_that_a_user_calls_latest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number, attempt, _ = make_attempt(RunDir(tmp_path), "7")
    (tmp_path / "logs" / "latest").mkdir()
    monkeypatch.setattr(files, "running_jobs", lambda: ["7"])
    claim_attempt(plan_of(tmp_path, number), "7")
    assert f"logs/latest is not ours and stays; the newest attempt is {attempt}" in capsys.readouterr().out
    assert newest_of(tmp_path) == (1, "7")


def test_the_jobs_of_a_copied_run_do_not_hold_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, copy, moved = tmp_path / "run", tmp_path / "the copy", tmp_path / "moved"
    number, _, _ = make_attempt(RunDir(run), "7")
    monkeypatch.setattr(files, "running_jobs", lambda: ["7", "8", "9"])
    claim_attempt(plan_of(run, number), "7")
    shutil.copytree(run, copy, symlinks=True)
    refuse_other_job(copy, "8", ["7", "8"])
    number, _, earlier = make_attempt(RunDir(copy), "8")
    assert (number, earlier) == (2, [])
    refuse_other_job(copy, "8", ["7", "8"], earlier)
    claim_attempt(plan_of(copy, number), "8")
    with pytest.raises(RecipeError, match="job 8 is running in "):
        refuse_other_job(copy, "9", ["7", "8", "9"])
    run.rename(moved)
    with pytest.raises(RecipeError, match=f"job 7 is running in {moved}; wait for it"):
        refuse_other_job(moved, "9", ["7", "9"])
    assert make_attempt(RunDir(moved), "9")[2] == ["7"]
    # As earlier versions have written it.
    (copy / "attempt").write_text("2 7\n")
    (copy / "logs" / "attempt_2" / "job").write_text("7")
    with pytest.raises(RecipeError, match="job 7 is running in "):
        refuse_other_job(copy, "9", ["7", "9"])
    assert make_attempt(RunDir(copy), "9")[2] == ["7"]


def test_an_attempt_after_the_logs_were_deleted_replaces_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "attempt").write_text("3 7\n")
    number, _, _ = make_attempt(RunDir(tmp_path), "8")
    monkeypatch.setattr(files, "running_jobs", lambda: ["8"])
    claim_attempt(plan_of(tmp_path, number), "8")
    monkeypatch.setenv("GSPO_ATTEMPT", "3")
    assert replacement(tmp_path) == f"attempt 3 was replaced by attempt 4 of {tmp_path}"


RUN, HERE = "/nowhere/run", "gspo: the job script failed at tests/unit/launch/test_job.py"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            FileNotFoundError(2, "No such file or directory", "/elsewhere/file"),
            rf"{HERE}:\d+: FileNotFoundError: .*; to go on: sbatch again",
        ),
        (
            RuntimeError("why"),
            rf"{HERE}:\d+: RuntimeError: why; to go on: sbatch again",
        ),
        (
            IsADirectoryError(21, "Is a directory", f"{RUN}/logs/restarts"),
            f"gspo: {RUN}/logs/restarts cannot be used \\(Is a directory\\); correct that, then: sbatch again",
        ),
    ],
)
def test_a_failure_of_the_script_itself_says_where_and_how_to_go_on(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings.read(ROOT, ROOT)
    attempt = script.Attempt(read_arguments((RECIPE,), ROOT), settings, "7")
    ended: list[bool] = []

    class Steps:
        def end_steps(self) -> None:
            ended.append(True)

    def fail() -> int:
        attempt._attempt, attempt._resume = Path(RUN) / "logs" / "attempt_1", "sbatch again"
        attempt._backend = Steps()  # type: ignore[assignment]
        raise error

    handlers = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    monkeypatch.setattr(attempt, "_run", fail)
    try:
        assert attempt.run() == FAILED
    finally:
        for number, handler in zip((signal.SIGUSR1, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    printed = capsys.readouterr()
    assert re.fullmatch(said, printed.out.splitlines()[-1]), printed.out
    assert ended == [True] and ("Traceback" in printed.err) == ("job script failed" in printed.out)


@pytest.mark.parametrize(("used", "requeue", "code"), [(0, "1", -signal.SIGKILL), (3, "1", REFUSED), (0, "0", REFUSED)])
def test_a_job_with_bad_nodes_is_queued_again_without_them(tmp_path: Path, used: int, requeue: str, code: int) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "bad_nodes").write_text("n2 GPU-1 has 3 uncorrected memory errors (attempt 1)\n")
    (tmp_path / "logs" / "restarts").write_text("once\n" * used)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f"#!/bin/bash\n[ $1 = show ] && echo 'JobId=7 ExcNodeList=n9 Requeue={requeue}' || echo \"scontrol $*\"\n"
        "[ $1 != update ] || kill -KILL $PPID\n"
    )
    scontrol.chmod(0o755)
    program = (
        "import sys; from pathlib import Path; from gspo_megatron.cluster.slurm_allocation import Allocation\n"
        "from gspo_megatron.cluster.slurm_backend import Place; from launch.job import Attempt, read_arguments\n"
        "from launch.lib.settings import Settings\n"
        "run = Path(sys.argv[1])\n"
        "here = Path.cwd()\n"
        "attempt = Attempt(read_arguments(('recipes/tiny_moe.yaml',), here), Settings.read(here, here), '7')\n"
        "attempt._resume = 'sbatch again'\n"
        "sys.exit(attempt._go_elsewhere(Place('7', run, run / 'logs' / 'attempt_1', 1, Allocation(), 2, 4), 3))"
    )
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done
    said = done.stdout.splitlines()
    if code == REFUSED:
        assert said == ["gspo: not queued again; to go on without n2 (--exclude): sbatch again"]
    else:
        again = ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n9,n2"]
        assert said == ["gspo: restart 1 of at most 3, without n2", *again]
