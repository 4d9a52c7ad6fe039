"""The batch script as SLURM runs it: a copy in a spool directory, whose checkout only slurmctld knows."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.places import ROOT

SCONTROL = """#!/bin/bash
echo asked >>"{folder}/asked"
[ "$(wc -l <"{folder}/asked")" -gt {fails} ] || {{ echo 'Unable to contact slurm controller' >&2; exit 1; }}
printf '%s\n' 'JobId=7 JobName=x   Command=/y' '   JobState=RUNNING' '   Command={command}' '   WorkDir=/'
"""


needs_environment = pytest.mark.skipif(
    not (ROOT / ".venv" / "bin" / "python").exists(), reason="it needs .venv of the checkout; make setup"
)


def run(folder: Path, fails: int, command: str, **more: str) -> subprocess.CompletedProcess[str]:
    spool = folder / "spool"
    spool.mkdir()
    shutil.copy(ROOT / "launch" / "gspo_moe.sh", spool / "slurm_script")
    for name, text in (
        ("scontrol", SCONTROL.format(folder=folder, fails=fails, command=command)),
        ("sleep", "#!/bin/sh"),
    ):
        (spool / name).write_text(text + "\n")
        (spool / name).chmod(0o755)
    settings = {
        "PATH": f"{spool}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": "/",
        "GSPO_SITE": "/dev/null",
    }
    words = ["bash", str(spool / "slurm_script"), "--help"]
    settings |= {"GSPO_VENV": str(ROOT / ".venv"), **more}
    return subprocess.run(words, env=settings, cwd=folder, capture_output=True, text=True, timeout=120)


@needs_environment
def test_a_slurmctld_that_restarts_is_waited_for(tmp_path: Path) -> None:
    done = run(tmp_path, 3, f"{ROOT}/launch/gspo_moe.sh")
    assert done.returncode == 0 and "sbatch --nodes=16 launch/gspo_moe.sh" in done.stdout, done
    assert len((tmp_path / "asked").read_text().split()) >= 4


@needs_environment
@pytest.mark.parametrize(
    "exported",
    [
        {"POSIXLY_CORRECT": "1"},
        {"CDPATH": f".:{ROOT}:/", "SHELLOPTS": "noclobber:noglob:posix", "BASHOPTS": "nullglob:failglob"},
        {"BASH_FUNC_cd%%": '() { builtin cd "$@" && ls; }', "BASH_FUNC_pwd%%": "() { echo here; }"},
        {"PYTHONHOME": "/nowhere", "PYTHONSAFEPATH": "1", "PYTHONINSPECT": "1", "PYTHONOPTIMIZE": "2"},
    ],
)
def test_what_the_user_s_shell_exports_changes_nothing(tmp_path: Path, exported: dict[str, str]) -> None:
    done = run(tmp_path, 0, f"{ROOT}/launch/gspo_moe.sh", **exported)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("A run of a recipe"), done
    words = ["launch/gspo_moe.sh", "--help"]
    settings = {"PATH": "/usr/bin:/bin", "GSPO_SITE": "/dev/null", "GSPO_VENV": ".venv", **exported}
    here = subprocess.run(words, env=settings, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (here.returncode, here.stdout, here.stderr) == (0, done.stdout, ""), here


@needs_environment
def test_without_scontrol_the_checkout_is_where_the_job_was_submitted(tmp_path: Path) -> None:
    # SLURM's commands may be found only by what the site file adds to PATH.
    tools = tmp_path / "tools"
    tools.mkdir()
    for program in ("bash", "env", "dirname", "sleep", "id", "grep", "printenv", "hostname"):
        (tools / program).symlink_to(shutil.which(program) or "")
    done = run(tmp_path, 10_000, "/nowhere", PATH=str(tools), SLURM_SUBMIT_DIR=str(ROOT))
    assert (done.returncode, done.stderr) == (0, "") and "sbatch --nodes=16 launch/gspo_moe.sh" in done.stdout, done


def test_a_command_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    done = run(tmp_path, 10_000, "/nowhere")
    assert done.returncode == 1, done
    last = done.stderr.splitlines()[-1]
    assert last.startswith("gspo: gspo_moe.sh, line ") and "submit the same command again" in last, done


def test_a_checkout_that_the_node_does_not_see_is_one_sentence(tmp_path: Path) -> None:
    done = run(tmp_path, 0, "/nowhere/launch/gspo_moe.sh")
    assert done.returncode == 2 and done.stderr.startswith(
        "gspo: //launch/lib is not there; submit from the checkout"
    ), done
