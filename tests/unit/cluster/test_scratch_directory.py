"""What servers leave in TMPDIR is deleted with its user, and a killed user's by the next one."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gspo_megatron.cluster.scratch_directory import scratch_directory

HOLD = """
import sys
from pathlib import Path
from gspo_megatron.cluster.scratch_directory import scratch_directory
with scratch_directory() as environment:
    Path(environment["TMPDIR"], "socket").touch()
    print(environment["TMPDIR"], flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / f"gspo-{pwd.getpwuid(os.getuid()).pw_name}"


def hold() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_it_goes_with_its_user(place: Path) -> None:
    process, path = hold()
    assert (path / "socket").exists()
    process.communicate()
    assert process.returncode == 0 and not list(place.iterdir())


def test_a_killed_user_s_is_deleted_by_the_next_and_a_living_user_s_stays(place: Path) -> None:
    living, kept = hold()
    killed, left = hold()
    (foreign := place / "server-notes").mkdir()
    killed.kill()
    killed.wait()
    with scratch_directory() as environment:
        assert sorted(place.iterdir()) == sorted([kept, Path(environment["TMPDIR"]), foreign]), left
    living.communicate()
    assert list(place.iterdir()) == [foreign]


def test_what_torch_compiles_stays_for_the_next_attempt(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with scratch_directory() as environment:
        assert Path(environment["TORCHINDUCTOR_CACHE_DIR"]).parent == place
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/of/the/user")
    with scratch_directory() as environment:
        assert environment["TORCHINDUCTOR_CACHE_DIR"] == "/of/the/user"
