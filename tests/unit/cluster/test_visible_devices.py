"""Servers and trainers get devices out of `CUDA_VISIBLE_DEVICES`; its rules are CUDA's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.cuda
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.cluster.local_backend import plan_roles
from gspo_megatron.cluster.machines import count_gpus, find_gpus
from gspo_megatron.cluster.visible_devices import Gpu, name_devices, select_devices
from gspo_megatron.config import RecipeError
from gspo_megatron.models import load_recipe
from launch.lib.probe import find_gpus as probe_gpus
from tests.places import ROOT

UUIDS = [f"GPU-{index}aaa{index}" for index in range(8)]
CASES = settings(max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10, deadline=None, print_blob=True)
RULES = [
    (None, ["0", "1", "2", "3", "4", "5", "6", "7"]),
    ("4,5", ["4", "5"]),
    ("5,4", ["5", "4"]),
    (" 4 , 5", ["4", "5"]),
    ("", []),
    ("-1", []),
    ("NoDevFiles", []),
    ("none", []),
    ("all", []),
    ("0,-1,1", ["0"]),
    ("0,8,1", ["0"]),
    ("8", []),
    ("0,0", []),
    ("0,8,0", []),
    ("2nd,3rd", ["2", "3"]),
    ("GPU-3aaa3", ["GPU-3aaa3"]),
    ("GPU-3,GPU-1", ["GPU-3", "GPU-1"]),
    ("GPU-", []),
    ("GPU-9", []),
    ("GPU-1,GPU-9,GPU-2", ["GPU-1"]),
    ("GPU-1,GPU-1a", []),
    ("GPU-1,2", ["GPU-1"]),
    ("1,GPU-2", ["1"]),
    ("MIG-a,MIG-b", ["MIG-a", "MIG-b"]),
    ("MIG-GPU-1aaa1/1/0", ["MIG-GPU-1aaa1/1/0"]),
    ("MIG-a,MIG-a", []),
    ("MIG-a,0", ["MIG-a"]),
]


@pytest.mark.parametrize(("text", "names"), RULES)
def test_what_a_text_shows(text: str | None, names: list[str]) -> None:
    assert select_devices(text, UUIDS) == names


@CASES
@given(
    text=st.one_of(
        st.lists(st.sampled_from(["0", "3", "7", "8", "-1", "2nd", "", " 1", "GPU-2", "x"]), max_size=5).map(",".join),
        st.lists(st.sampled_from([*UUIDS, "GPU-1", "GPU-", "GPU-9", "0"]), max_size=4).map(",".join),
    )
)
def test_torch_counts_the_same(text: str) -> None:
    """The rules of CUDA as torch wrote them down for its own count without a driver."""
    patch = pytest.MonkeyPatch()
    patch.setenv("CUDA_VISIBLE_DEVICES", text)
    patch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: len(UUIDS))
    patch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: UUIDS)
    try:
        assert len(select_devices(text, UUIDS)) == torch.cuda._device_count_nvml()
    finally:
        patch.undo()


@pytest.fixture
def eight_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi lists eight GPUs; number 7 is of another kind."""
    rows = [(uuid, "NVIDIA H200" if uuid == UUIDS[7] else "NVIDIA H100 80GB HBM3") for uuid in UUIDS]
    script = f"""#!{sys.executable}
import json, sys
values = {{"driver_version": "580.1", "memory.used": "4"}}
for uuid, name in json.loads({json.dumps(json.dumps(rows))}):
    keys = sys.argv[1].removeprefix("--query-gpu=").split(",")
    print(", ".join({{**values, "uuid": uuid, "name": name}}[key] for key in keys))
"""
    (tmp_path / "nvidia-smi").write_text(script)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(
    ("text", "count", "servers"),
    [(None, 8, ["0", "1"]), ("4,5", 2, ["4", "5"]), ("GPU-6,GPU-2", 2, ["GPU-6", "GPU-2"]),
     ("MIG-a,MIG-b", 2, ["MIG-a", "MIG-b"]), ("5,6,7,9", 3, ["5", "6"])],
)  # fmt: skip
def test_every_role_of_a_machine_gets_devices_out_of_the_list(
    text: str | None, count: int, servers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert count_gpus() == count and len(probe_gpus()) == (8 if "MIG" in str(text) else count)
    recipe = load_recipe(ROOT / "recipes" / "tiny_moe.yaml", ["placement.gpu=h100", "rollout.servers=2"])
    roles = {role.name: role.environment for role in plan_roles(recipe, tmp_path, count)}
    assert [roles[f"rollout-{index}"]["CUDA_VISIBLE_DEVICES"] for index in range(2)] == servers
    # Trainer ranks see the whole list and take LOCAL_RANK of it, so that NCCL can use the links between them.
    assert [roles[f"trainer-{rank}"]["LOCAL_RANK"] for rank in range(count)] == [str(rank) for rank in range(count)]
    assert all("CUDA_VISIBLE_DEVICES" not in roles[f"trainer-{rank}"] for rank in range(count))


@pytest.mark.usefixtures("eight_gpus")
def test_the_kind_is_that_of_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_gpus() == ("h100", 8)
    for text, found in (("7", ("h200", 1)), ("GPU-7", ("h200", 1)), ("MIG-a", (None, 1)), ("", ("cpu", None))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert find_gpus() == found


@pytest.mark.usefixtures("eight_gpus")
def test_a_server_that_has_no_device_is_refused_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    recipe = load_recipe(ROOT / "recipes" / "tiny_moe.yaml", ["placement.gpu=h100", "rollout.servers=3"])
    with pytest.raises(RecipeError, match=r"rollout\.servers: GPU number 2 is wanted, .*=4,5 shows 2"):
        plan_roles(recipe, tmp_path, 2)


def test_places_become_the_names_of_the_node(tmp_path: Path) -> None:
    visible = [Gpu("4", ""), Gpu("GPU-5", ""), Gpu("7", "")]
    assert name_devices("0,2", visible) == "4,7" and name_devices("1", visible) == "GPU-5"
    assert name_devices("2,3", []) == "2,3"


@pytest.mark.usefixtures("eight_gpus")
def test_a_task_of_a_job_gets_the_granted_devices_of_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SLURM does not constrain devices, only the variable says which ones it has granted."""
    say = tmp_path / "say.py"
    say.write_text("import os\nprint(os.environ['CUDA_VISIBLE_DEVICES'])\n")
    task = {"kind": "trainer", "name": "trainer-0", "host": "n1", "local": 0, "arguments": [str(say)],
            "environment": {"CUDA_VISIBLE_DEVICES": "0,1"}, "ports": [], "restarts": 0}  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps({"tasks": [task], "hosts": [["n1", "10.0.0.1"]], "attempt": 1}))
    (tmp_path / "key").write_text("key")
    place = {"SLURMD_NODENAME": "n1", "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "6,7", "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-m", "launch.lib.task", str(tmp_path), "trainer"], cwd=ROOT, env={**os.environ, **place},
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout.splitlines()[-1] == "6,7", said.stderr
