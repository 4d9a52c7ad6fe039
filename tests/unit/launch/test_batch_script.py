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


def run(folder: Path, fails: int, command: str) -> subprocess.CompletedProcess[str]:
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
    settings["GSPO_VENV"] = str(ROOT / ".venv")
    return subprocess.run(words, env=settings, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(
    not (ROOT / ".venv" / "bin" / "python").exists(), reason="it needs .venv of the checkout; make setup"
)
def test_a_slurmctld_that_restarts_is_waited_for(tmp_path: Path) -> None:
    done = run(tmp_path, 3, f"{ROOT}/launch/gspo_moe.sh")
    assert done.returncode == 0 and "sbatch --nodes=16 launch/gspo_moe.sh" in done.stdout, done
    assert len((tmp_path / "asked").read_text().split()) >= 4


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
