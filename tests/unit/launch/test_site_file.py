"""A mistake in the site file is one sentence with file, line and what to do; what a module system does is none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.places import ROOT

NEXT = """
set -euo pipefail
echo "venv=${GSPO_VENV-} a=${A-} arguments=$*"
echo "shell $- $(trap) $(shopt -p nullglob failglob | tr '\\n' ' ')$(printf %q "$IFS") $(type -t cd) umask=$(umask)"
env | sort
"""


def load(tmp_path: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    site = tmp_path / "site file.sh"
    site.write_text(text, newline="")
    (tmp_path / "next.sh").write_text(NEXT)
    settings = {"PATH": "/usr/bin:/bin", "GSPO_SITE": str(site), **environment}
    # A signal that the caller ignores, as under nohup, is a trap of every shell.
    script = ["bash", str(ROOT / "launch/lib/site.sh"), str(ROOT), str(tmp_path / "next.sh"), "one", "two words"]
    command = ["env", "--default-signal", *script]
    return subprocess.run(command, env=settings, capture_output=True, text=True, stdin=subprocess.DEVNULL)


CLEAN = r"shell ehpuB  shopt -u nullglob shopt -u failglob $' \t\n' builtin umask="
"""Of a shell that nobody has changed."""


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("A=1\nmodule load cuda\n", 2, "`module load cuda`: command not found; define it there first"),
        ("\n\nif true; then\n", 4, "syntax error: unexpected end of file; correct that line"),
        ("A=1\nA=(1 2\n", 2, "unexpected EOF while looking for matching"),
        ("A=1\n\n: ${MUST:?set it}\nB=2\n", 3, "ended the script; correct the line"),
        ("set -u\necho $UNKNOWN\n", 2, "ended the script; correct the line"),
        ("A=1\nexit 3\n", 2, "ended the script; correct the line"),
        ("trap 'echo bye >&2' EXIT\nexit 0\n", 2, "ended the script; correct the line"),
        ("trap - EXIT\n\nexit 3\n", 3, "ended the script; correct the line"),
        ("set -euo pipefail\nA=1\nfalse\n", 3, "ended the script; correct the line"),
        ("A=1\nexec bash -l\n", 2, "`exec bash -l` would take the place of the job's script; call it without exec"),
        ("A=1\nf() { builtin exec -a x $SHELL; }\n\nf\n", 4, "would take the place of the job's script"),
        ("A=1\nset -o noexec\nB=1\n", 2, "`set -o noexec` would leave a shell that runs nothing more"),
        ("set -u -xn\n", 1, "`set -u -xn` would leave a shell that runs nothing more"),
        ("A=1\nset -r\n", 2, "`set -r` would leave a shell that runs nothing more"),
        ("A=1\n\neval 'exec env'\n", 3, "`exec env` would take the place of the job's script"),
        ("refuse() { :; }\nhome=/nowhere\nmodule load x\n", 3, "command not found"),
    ],
)
def test_a_mistake_is_refused_in_one_sentence(tmp_path: Path, text: str, line: int, words: str) -> None:
    done = load(tmp_path, text)
    assert done.returncode == 2 and done.stdout == ""
    own = [said for said in done.stderr.splitlines() if said.startswith("gspo: ")]
    assert len(own) == 1 and words in own[0], done.stderr
    assert f"{tmp_path}/site file.sh" in own[0]
    assert f"line {line}" in own[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A=1\r\nGSPO_VENV=/x\r\n", "has Windows line ends; remove them: sed -i"),
        ("unset PATH\n", "leaves PATH= without the system's programs"),
        ("PATH=/opt/new/bin\n", "leaves PATH=/opt/new/bin without the system's programs"),
        ("GSPO_MOUNTS=(/a:/a /b:/b)\n", "makes GSPO_MOUNTS an array, which a job does not inherit"),
    ],
)
def test_a_file_that_would_break_what_comes_after_it_is_refused(tmp_path: Path, text: str, words: str) -> None:
    done = load(tmp_path, text)
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr


def test_libraries_with_which_no_program_starts_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "libc.so.6").write_text("of another machine")
    done = load(tmp_path, f"export LD_LIBRARY_PATH={tmp_path}\n")
    (own,) = done.stderr.splitlines()
    assert done.returncode == 2 and own.startswith(f"gspo: after the site file {tmp_path}/site file.sh no program")
    assert "libc.so.6" in own and "correct its LD_LIBRARY_PATH" in own


EXPORTED = {
    "BASH_FUNC_cd%%": '() { builtin cd "$@" && ls; }', "BASH_FUNC_exec%%": "() { echo mine; }",
    "BASH_FUNC_grep%%": '() { command grep --color=always "$@"; }', "BASH_FUNC_printenv%%": "() { echo x; }",
    "BASH_FUNC_module%%": "() { echo loaded $2; }",
}  # fmt: skip
"""Functions of a user's shell, as bash exports them."""


def test_of_what_the_user_s_shell_exports_only_functions_of_other_names_count(tmp_path: Path) -> None:
    done = load(tmp_path, "module load cuda\ncd /\n", **EXPORTED)
    said = done.stdout.splitlines()
    expected = ["loaded cuda", "venv= a= arguments=one two words"]
    assert (done.returncode, done.stderr, said[:2]) == (0, "", expected), done
    assert said[2].startswith(CLEAN)


def test_a_return_that_is_not_meant_is_a_warning(tmp_path: Path) -> None:
    done = load(tmp_path, "A=1\n[ -d /nowhere ] || return 3\nGSPO_VENV=/x\n")
    (own,) = done.stderr.splitlines()
    assert done.returncode == 0 and "line 2: `return 3` ended it with 3 and the job goes on without the lines" in own
    assert load(tmp_path, "A=1\n[ -d /nowhere ] || return 0\n").stderr == ""


def test_a_directory_is_no_site_file(tmp_path: Path) -> None:
    done = load(tmp_path, "", GSPO_SITE=str(tmp_path))
    assert done.returncode == 2 and f"gspo: the site file {tmp_path} is a directory" in done.stderr


@pytest.mark.parametrize(
    "text",
    ["IFS=,", "cd /", "home=/nowhere", "set -- a b", "shift 0", "trap : EXIT DEBUG ERR", "set -xfC 2>/dev/null",
     "shopt -s nullglob failglob", "readonly GSPO_VENV=x", "readonly name=1 fault site_file", "cd() { exit; }",
     "set -euo pipefail", "return 0\nset -n", "exec 5</dev/null", "exec 3>&1 {other}</dev/null", "(exec true)",
     "B=$(exec echo 1)", "trap '' CHLD USR1 TERM HUP", "set -u; trap 'false' USR1"],
)  # fmt: skip
def test_nothing_that_it_does_to_its_shell_reaches_ours(tmp_path: Path, text: str) -> None:
    done = load(tmp_path, f"A=1\nexport A\n{text}\n")
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert said[0].startswith("venv=") and said[0].endswith(" a=1 arguments=one two words"), done.stdout
    assert said[1].startswith(CLEAN), said[1]


def test_what_slurm_says_of_the_job_stays(tmp_path: Path) -> None:
    text = "unset ${!SLURM_@}\nSLURM_RESTART_COUNT=\nexport -n SLURM_PROCID=0\nexport SLURM_CONF=/other\nIFS=_\n"
    says = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "a  b=c\n_", "SLURM_RESTART_COUNT": "2", "SLURM_CONF": "/etc/slurm"}
    done = load(tmp_path, text, **says, SLURM_PROCID="0")
    lines = set(done.stdout.splitlines())
    expected = {
        "SLURM_JOB_ID=7",
        "SLURM_JOB_NAME=a  b=c",
        "SLURM_RESTART_COUNT=2",
        "SLURM_PROCID=0",
        "SLURM_CONF=/other",
    }
    assert done.returncode == 0 and expected <= lines, done


def test_limits_and_umask_are_meant_and_inherited(tmp_path: Path) -> None:
    assert load(tmp_path, "umask 027\n").stdout.splitlines()[1] == f"{CLEAN}0027"


@pytest.mark.parametrize(
    ("text", "line", "command"),
    [("A=1\ngrep nothing /dev/null\nA=2\n", 2, "grep nothing /dev/null"), ("A=2\ncd /nowhere\n", 2, "cd /nowhere"),
     ("f() { return 4; }\nA=2\nf\n", 3, "return 4")],
)  # fmt: skip
def test_a_command_that_fails_is_a_warning(tmp_path: Path, text: str, line: int, command: str) -> None:
    done = load(tmp_path, text)
    assert done.returncode == 0 and done.stdout.startswith("venv= a= ")
    (own,) = [said for said in done.stderr.splitlines() if said.startswith("gspo: ")]
    assert f"line {line}: `{command}` ended with" in own and "the job goes on" in own


def test_what_module_systems_and_tests_do_is_no_mistake(tmp_path: Path) -> None:
    text = "A=$UNSET_BY_LMOD\nmodule() { false || true; }\nmodule load cuda\nif grep -q x /dev/null; then A=3; fi\n"
    text += "(exit 3) || true\nfalse | true\n"
    done = load(tmp_path, text + "GSPO_VENV=/shared/venv\nGSPO_MOUNTS=/a:/b\n[ -f /nowhere ] && A=4\n")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("venv=/shared/venv a= ")
    assert {"GSPO_VENV=/shared/venv", "GSPO_MOUNTS=/a:/b"} <= set(done.stdout.splitlines()), "launch/job.py reads them"


def test_path_and_home_are_there_whatever_sbatch_exports(tmp_path: Path) -> None:
    (tmp_path / "next.sh").write_text(NEXT)
    command = ["env", "-i", "GSPO_SITE=/dev/null", "/bin/bash", str(ROOT / "launch/lib/site.sh"), str(ROOT)]
    done = subprocess.run([*command, str(tmp_path / "next.sh")], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    path = next(line for line in lines if line.startswith("PATH="))
    assert "/usr/bin" in path.split(":") and "." not in path.split(":")
    assert any(line.startswith("HOME=/") for line in lines)
