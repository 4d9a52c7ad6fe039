"""What the preflight makes of the nodes' reports: a sentence a fault, with the node and the fix."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import count_parameters
from launch.lib import probe
from launch.lib.preflight import GIB, find_sick, judge, warnings
from launch.lib.text import fold
from tests.places import GOLDEN

RECIPE = load_recipe(GOLDEN / "moe.yaml")
HEALTHY = {"uncorrected": "0", "remap_failed": "No", "remap_pending": "No", "persistence": "Enabled"}
H100 = {"name": "NVIDIA H100 80GB HBM3", "driver": "580.1", "used_mib": 4}


def report(host: str, **changes: Any) -> dict[str, Any]:
    return {
        "host": host,
        "kind": "trainer",
        "faults": [],
        "address": "10.0.0.1",
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "commit": "abc",
        "gpus": [H100] * 8,
        "free_bytes": {"/tmp": 9 * GIB, "/dev/shm": 9 * GIB},
        "run_dir_free_bytes": 9000 * GIB,
        "used_ports": [],
        "clock_offset": 0.01,
        "warnings": [],
        "adapters": ["mlx5_0/1 4: ACTIVE"],
        "gpu_health": {"GPU-1": HEALTHY},
        "xids": [],
        "dcgm": "Healthy",
        **changes,
    }


GOOD = [report("n1", clock_offset=None), report("n2"), report("n3")]


def test_nodes_that_are_alike_pass() -> None:
    assert judge(GOOD, ["n1", "n2", "n3"], 8, RECIPE) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"faults": ["it cannot reach n1"]}, "n2: it cannot reach n1"),
        ({"used_ports": [20001]}, "n2: port 20001 is taken by another program"),
        ({"free_bytes": {"/dev/shm": GIB // 2}}, "n2: /dev/shm has 0.50 GiB free, 1 is needed"),
        (
            {"free_bytes": {"/dev/shm": 0}},
            "n2: /dev/shm has 0.00 GiB free, 1 is needed; mount it larger (of a container",
        ),
        ({"adapters": ["mlx5_0/1 1: DOWN"]}, "n2: number of active network ports is 0, 1 elsewhere"),
        ({"dcgm": "Failure"}, "n2: dcgmi health reports a failure; leave the node out"),
        ({"gpu_health": {"GPU-7": {**HEALTHY, "uncorrected": "3"}}}, "n2: GPU-7 has 3 uncorrected memory errors"),
        ({"gpu_health": {"GPU-7": {**HEALTHY, "remap_pending": "Yes"}}}, "n2: GPU-7 has memory rows to remap"),
        ({"run_dir_free_bytes": GIB}, "n2: the run directory has 1.0 GiB free, 3 checkpoints take"),
        ({"clock_offset": -31.5}, "n2: its clock is off by -31.5 s"),
        ({"gpus": [H100] * 7}, "n2: nvidia-smi lists 7 GPUs where SLURM granted 8"),
        ({"gpus": [{**H100, "used_mib": 70000}] * 8}, "n2: 70000 MiB of GPU 0 are in use before the job starts"),
        ({"gpus": [{**H100, "name": "NVIDIA A100"}] * 8}, "n2: GPU is NVIDIA A100, NVIDIA H100 80GB HBM3 elsewhere"),
        (
            {"gpus": [H100] * 7 + [{**H100, "name": "NVIDIA A100"}]},
            "n2: it has GPUs of 2 kinds, NVIDIA A100 and NVIDIA",
        ),
        ({"gpus": [{**H100, "driver": "535.1"}] * 8}, "n2: GPU driver is 535.1, 580.1 elsewhere"),
        ({"versions": {"python": "3.12.1", "torch": "2.12.0"}}, "n2: torch of the trainer is 2.12.0, 2.13.0 elsewhere"),
        ({"versions": {"python": "3.12.1"}}, "n2: torch of the trainer is absent, 2.13.0 elsewhere"),
        ({"commit": "def"}, "n2: commit of the checkout is def, abc elsewhere"),
    ],
)
def test_a_fault_names_its_node_and_the_fix(changes: dict[str, Any], sentence: str) -> None:
    said = judge([GOOD[0], report("n2", **changes), GOOD[2]], ["n1", "n2", "n3"], 8, RECIPE)
    assert said and said[0].startswith(sentence)
    assert all("n2: " in line for line in said)


def test_sick_nodes_are_those_whose_hardware_must_not_be_used() -> None:
    broken = {**HEALTHY, "uncorrected": "1", "remap_failed": "Yes"}
    reports = [report("n1", gpu_health={"GPU-1": HEALTHY, "GPU-2": broken}), report("n2", dcgm="Failure"), report("n3")]
    # A GPU without ECC has no counter.
    reports.append(report("n4", gpu_health={"GPU-1": dict.fromkeys(HEALTHY, "[N/A]")}, dcgm=""))
    assert dict(find_sick(reports)) == {
        "n1": "GPU-2 has 1 uncorrected memory errors", "n2": "dcgmi health reports a failure"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"warnings": ["locked memory is limited to 64 KiB"]}, "n2: locked memory is limited to 64 KiB"),
        ({"adapters": ["mlx5_0/1 4: ACTIVE", "mlx5_1/1 2: INIT"]}, "n2: port mlx5_1/1 2: INIT, which is not active"),
        ({"xids": ["0000:1a:00 79"]}, "n2: the kernel's log has Xid 79 of GPU 0000:1a:00"),
        ({"dcgm": "Warning"}, "n2: dcgmi health reports a warning"),
        ({"gpu_health": {"GPU-1": {**HEALTHY, "persistence": "Disabled"}}}, "n2: 1 GPUs without persistence mode"),
    ],
)
def test_what_only_explains_a_slow_run_is_a_warning(changes: dict[str, Any], sentence: str) -> None:
    reports = [GOOD[0], report("n2", **changes), report("n2", kind="rollout", **changes)]
    (said,) = warnings(reports)
    assert said.startswith(sentence) and warnings(GOOD) == []


def test_memory_that_the_driver_does_not_count_is_no_fault() -> None:
    assert judge([report("n1", gpus=[{**H100, "used_mib": None}] * 8)], ["n1"], 8, RECIPE) == []


def test_a_node_without_a_report_is_named() -> None:
    assert judge([], ["n1"], 8, RECIPE) == [
        "n1: it left no report in the run directory; mount the directory there, or give another run.directory"
    ]
    assert judge(GOOD[:2], ["n1", "n2", "n3"], 8, RECIPE)[0].startswith("n3: it left no report in the run directory")


def test_two_environments_are_not_held_against_each_other() -> None:
    apart = [*GOOD[:2], report("n3", kind="rollout", versions={"torch": "2.12.0", "vllm": "0.32.0"})]
    assert judge(apart, ["n1", "n2", "n3"], 8, RECIPE) == []


def test_parameters_of_30b_a3b() -> None:
    assert abs(count_parameters(RECIPE.arch) / 30.53e9 - 1) < 0.001


def test_nodes_find_each_other_and_compare_clocks(tmp_path: Path, free_port: int) -> None:
    first = {"host": "n1", "kind": "trainer", "faults": [], "used_ports": [], "address": "127.0.0.1"}
    second: dict[str, Any] = {"host": "n2", "kind": "trainer", "faults": []}
    answering = threading.Thread(target=probe.answer_others, args=(tmp_path, first, 1, free_port))
    answering.start()
    probe.meet_first(tmp_path, second, "n1", free_port)
    answering.join(10)
    assert second["faults"] == [] and abs(second["clock_offset"]) < 1


def test_a_first_node_that_cannot_be_reached_is_a_fault(tmp_path: Path, free_port: int) -> None:
    about = {"host": "n1", "kind": "trainer", "faults": [], "used_ports": [], "address": "127.0.0.1"}
    (tmp_path / "trainer-n1.json").write_text(json.dumps(about))
    asking: dict[str, Any] = {"host": "n2", "kind": "trainer", "faults": []}
    probe.meet_first(tmp_path, asking, "n1", free_port)
    assert asking["faults"][0].startswith(f"it cannot reach n1 at 127.0.0.1:{free_port}")


def test_what_the_recipe_reads_must_be_there(tmp_path: Path) -> None:
    read = {"model.path": str(tmp_path), "data.path": str(tmp_path / "train.jsonl")}
    (fault,) = probe.find_missing(read)
    assert fault.startswith(f"data.path={tmp_path}/train.jsonl is not there; put it on a file system")


def test_an_interface_that_is_missing_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[str] = []
    monkeypatch.setenv("GSPO_INTERFACE", "none0")
    probe.find_address(faults)
    assert faults[0].startswith("interface none0 has no IPv4 address")
    monkeypatch.setenv("GSPO_INTERFACE", "lo")
    assert probe.find_address(faults) == "127.0.0.1"


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probed:
        probed.bind(("127.0.0.1", 0))
        return probed.getsockname()[1]


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["node1"], "node1"),
        (["node1", "node2", "node3"], "node[1-3]"),
        (["n08", "n09", "n10", "n12"], "n[08-10],n12"),
        (["login", "n1", "n3"], "login,n1,n3"),
        (["a1", "b2"], "a1,b2"),
    ],
)
def test_names_are_folded_as_slurm_writes_them(names: list[str], folded: str) -> None:
    assert fold([Named(name) for name in names]) == folded
