"""A mistake in the site file is one sentence with file, line and what to do; what a module system does is none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.places import ROOT

LOAD = """
set -euo pipefail
home=$1
before=$(trap)  # signals that the caller ignores, as nohup does
. "$home/launch/lib/site.sh"
load_site
echo "venv=$GSPO_VENV a=${A-}"
[[ $- == *e* && $- == *u* && $- != *T* ]] && [ "$(trap)" = "$before" ] || echo "options or traps are left"
env | sort
"""


def load(tmp_path: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    site = tmp_path / "site file.sh"
    site.write_text(text)
    settings = {"PATH": "/usr/bin:/bin", "GSPO_SITE": str(site), **environment}
    return subprocess.run(["bash", "-c", LOAD, "load", str(ROOT)], env=settings, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("A=1\nmodule load cuda\n", 2, "`module load cuda`: command not found; define it there first"),
        ("\n\nif true; then\n", 4, "syntax error: unexpected end of file; correct that line"),
        ("A=1\nA=(1 2\n", 2, "unexpected EOF while looking for matching"),
        ("A=1\n\n: ${MUST:?set it}\nB=2\n", 3, "ended the script; correct the line"),
        ("set -u\necho $UNKNOWN\n", 2, "ended the script; correct the line"),
        ("A=1\nexit 3\n", 2, "ended the script; correct the line"),
    ],
)
def test_a_mistake_is_refused_in_one_sentence(tmp_path: Path, text: str, line: int, words: str) -> None:
    done = load(tmp_path, text)
    assert done.returncode == 2 and done.stdout == ""
    own = [said for said in done.stderr.splitlines() if said.startswith("gspo: the site file ")]
    assert len(own) == 1 and words in own[0], done.stderr
    assert f"{tmp_path}/site file.sh" in own[0]
    assert f"line {line}" in own[0]


@pytest.mark.parametrize(
    ("text", "line", "command"),
    [("A=1\ngrep nothing /dev/null\nA=2\n", 2, "grep nothing /dev/null"), ("A=2\ncd /nowhere\n", 2, "cd /nowhere"),
     ("f() { return 4; }\nA=2\nf\n", 3, "return 4")],
)  # fmt: skip
def test_a_command_that_fails_is_a_warning(tmp_path: Path, text: str, line: int, command: str) -> None:
    done = load(tmp_path, text)
    assert done.returncode == 0 and done.stdout.startswith("venv=.venv a=2\n")
    (own,) = [said for said in done.stderr.splitlines() if said.startswith("gspo: ")]
    assert f"line {line}: `{command}` ended with" in own and "the job goes on" in own


def test_what_module_systems_and_tests_do_is_no_mistake(tmp_path: Path) -> None:
    text = "A=$UNSET_BY_LMOD\nmodule() { false || true; }\nmodule load cuda\nif grep -q x /dev/null; then A=3; fi\n"
    done = load(tmp_path, text + "GSPO_VENV=/shared/venv\nGSPO_MOUNTS=/a:/b\n")
    assert done.returncode == 0 and done.stderr == "" and "options or traps" not in done.stdout
    assert done.stdout.startswith("venv=/shared/venv a=\n")
    assert {"GSPO_VENV=/shared/venv", "GSPO_MOUNTS=/a:/b", "GSPO_ROLLOUT_VENV=/shared/venv"} <= set(
        done.stdout.splitlines()
    ), "launch/job.py reads them from the environment"


def test_path_and_home_are_there_whatever_sbatch_exports() -> None:
    command = ["env", "-i", "GSPO_SITE=/dev/null", "/bin/bash", "-c", LOAD, "load", str(ROOT)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    path = next(line for line in lines if line.startswith("PATH="))
    assert "/usr/bin" in path.split(":") and "." not in path.split(":")
    assert any(line.startswith("HOME=/") for line in lines)
