"""What a node says of its own health, with stand-ins for the tools that are not here."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gspo_megatron.cluster.scratch_directory import user_name
from gspo_megatron.cluster.visible_devices import query_gpus
from launch.lib import probe, probe_health
from launch.lib.probe_health import ask_dcgm, find_adapters, find_gpu_health, find_limits, find_unwritable, find_xids
from tests.places import ROOT


def tool(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_a_place_is_tried_with_a_byte_and_has_its_own_cure(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    faults = find_unwritable({str(tmp_path): "no", str(missing): "mount it", "/proc": "set TMPDIR", "/dev/full": "x"})
    assert faults[0] == f"{missing} cannot be written (No such file or directory); mount it"
    assert faults[1].startswith("/proc cannot be written (") and faults[1].endswith("; set TMPDIR")
    assert len(faults) == 3 and os.listdir(tmp_path) == []


def test_tmpdir_is_taken_as_it_is_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere")
    assert probe_health.scratch() == "/nowhere"
    caches = f"/nowhere/gspo-{user_name()}"
    assert set(probe_health.places(Path("/run"))) == {"/run", "/nowhere", caches, "/dev/shm"}


def test_the_place_of_the_caches_must_be_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / f"gspo-{user_name()}").touch()
    (fault,) = find_unwritable(probe_health.places(tmp_path))
    assert fault.startswith(f"{tmp_path}/gspo-{user_name()} cannot be written (") and "set TMPDIR" in fault
    (tmp_path / f"gspo-{user_name()}").unlink()
    assert find_unwritable(probe_health.places(tmp_path)) == []


def test_a_full_place_is_not_to_be_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(probe_health.tempfile, "NamedTemporaryFile", fill)
    (fault,) = find_unwritable({str(tmp_path): "mount it writable"})
    assert fault == f"{tmp_path} cannot be written (No space left on device); {probe_health.FULL}"


def test_a_disk_that_runs_nothing_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/scratch")
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC | os.ST_NOSUID))
    assert probe_health.find_noexec() == [
        f"/scratch is mounted noexec, and compiled kernels are loaded from it; {probe_health.FIX_SCRATCH}"
    ]
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOSUID))
    assert probe_health.find_noexec() == []


def test_a_hard_limit_of_a_login_node_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_health.resource, "getrlimit", lambda _: (3600, 3600))
    faults, _ = find_limits(has_rdma=False)
    assert (
        "CPU time (seconds) of a process is limited to 3600; have that hard limit raised (ulimit -a shows it)" in faults
    )


def test_the_soft_limit_of_files_is_raised_to_the_hard_one() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 2000))\n"
        "from launch.lib.probe_health import find_limits, raise_limits; raise_limits()\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE)); print(find_limits(False)[0][0])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    soft, fault = done.stdout.splitlines()
    assert soft == "2000 2000" and fault.startswith("a process may open 2000 files, 4096 are needed; raise LimitNOFILE")


def test_locked_memory_matters_only_to_rdma(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    locked = {resource.RLIMIT_MEMLOCK: (65536, 65536)}
    monkeypatch.setattr(resource, "getrlimit", lambda number: locked.get(number, unlimited))
    assert find_limits(has_rdma=False) == ([], [])
    (warning,) = find_limits(has_rdma=True)[1]
    assert warning.startswith("locked memory is limited to 64 KiB, RDMA registers all that it sends; set LimitMEMLOCK")
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    assert find_limits(has_rdma=True) == ([], [])


def test_without_any_tool_nothing_is_known(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(probe_health, "INFINIBAND", tools / "none")
    assert (find_gpu_health(), find_xids(), ask_dcgm(), find_adapters()) == ({}, [], "", [])


def test_what_the_tools_say_is_read(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tools, "nvidia-smi", "echo 'GPU-1, 0, No, No, Enabled'; echo 'GPU-2, 5, Yes, [N/A], Disabled'; echo error")
    tool(tools, "dmesg", "echo '[9.1] NVRM: Xid (PCI:0000:1a:00): 79, pid=1'; echo 'NVRM: Xid (PCI:0000:1a:00): 13, x'")
    tool(tools, "dcgmi", "echo '| Overall Health            | Warning        |'")
    state = tools / "infiniband" / "mlx5_0" / "ports" / "1"
    state.mkdir(parents=True)
    (state / "state").write_text("4: ACTIVE\n")
    monkeypatch.setattr(probe_health, "INFINIBAND", tools / "infiniband")
    assert find_gpu_health()["GPU-2"] == {
        "uncorrected": "5", "remap_failed": "Yes", "remap_pending": "[N/A]", "persistence": "Disabled"
    }  # fmt: skip
    assert find_xids() == ["0000:1a:00 79"], "an Xid 13 is the program's own fault"
    assert ask_dcgm() == "Warning" and find_adapters() == ["mlx5_0/1 4: ACTIVE"]


@pytest.mark.parametrize("end", ["kill -KILL $$", "sleep 30"])
def test_a_tool_that_fails_or_hangs_says_nothing(tools: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(probe_health, "HEALTH_SECONDS", 0.5)
    tool(tools, "nvidia-smi", f"echo 'GPU-1, 0, No, No, Enabled'; {end}")
    assert find_gpu_health() == {}


def test_faults_that_are_an_exit_code_too_are_heard(tools: Path) -> None:
    tool(tools, "nvidia-smi", "echo 'GPU-1, 7, No, No, Enabled'; echo 'WARNING: infoROM, at, gpu, 0, is bad'; exit 14")
    tool(tools, "dcgmi", "echo '| Overall Health | Failure |'; exit 1")
    assert find_gpu_health()["GPU-1"]["uncorrected"] == "7" and len(find_gpu_health()) == 1
    assert ask_dcgm() == "Failure"
    tool(tools, "nvidia-smi", "echo 'GPU-1, H100, 580.1, [N/A]'; echo 'WARNING: infoROM is corrupted'")
    assert probe.find_gpus() == [{"name": "H100", "driver": "580.1", "used_mib": None}]
    tool(tools, "nvidia-smi", "echo GPU-1; echo 'WARNING: infoROM is corrupted at gpu 0000:1A:00.0'")
    assert query_gpus() == [["GPU-1"]]


def test_a_field_that_an_older_driver_does_not_know_takes_no_other_away(tools: Path) -> None:
    unknown = "case $* in *remapped*) echo 'Field \"remapped_rows.failure\" is not a valid field to query.'; exit 2;; "
    tool(tools, "nvidia-smi", f"{unknown} *ecc*) echo 'GPU-1, 7';; *) echo 'GPU-1, Enabled';; esac")
    expected = {"uncorrected": "7", "remap_failed": "[N/A]", "remap_pending": "[N/A]", "persistence": "Enabled"}
    assert find_gpu_health() == {"GPU-1": expected}


def test_a_node_with_ipv6_only_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str) -> str:
        raise OSError(-5, "No address associated with hostname")

    monkeypatch.delenv("GSPO_INTERFACE", raising=False)
    monkeypatch.setattr(probe.socket, "gethostbyname", resolve)
    monkeypatch.setattr(probe, "has_ipv6", lambda name: True)
    faults: list[str] = []
    probe.find_address(faults)
    assert "has no IPv4 address (IPv6 only, and the rendezvous is over IPv4); name an interface" in faults[0]
