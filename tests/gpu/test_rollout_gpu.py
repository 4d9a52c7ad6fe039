"""Trainer and server taking turns on one GPU: memory that is given up and taken again, weights handed over by CUDA IPC.

`make test-gpu-rollout`, for one GPU of the H100 or H200 class with vLLM's CUDA build. The test of a server that is
killed during an update over NCCL takes three.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from gspo_megatron.cluster.machines import find_gpus
from gspo_megatron.cluster.visible_devices import VARIABLE, list_gpus
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.controller_client import ControllerClient
from gspo_megatron.transport.messages import RolloutRequest
from gspo_megatron.transport.weights.ipc import device_name
from gspo_megatron.transport.weights.sender import WeightSender
from gspo_megatron.transport.weights.wire import TransferError
from tests.places import ROOT
from tests.rollout.conftest import KEY, ControllerThread, Server, make_run_dir, open_controller, running_servers
from tests.rollout.tiny import ARCH, Oracle, make_recipe
from tests.rollout.updates import differences, update_check, update_request
from tests.shards import cut_shards
from tests.waiting import HANG


def has_vllm() -> bool:
    """Whether vLLM's CUDA build is installed; the one for CPUs has another name."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: sleeping servers and CUDA IPC are unseen"),
    pytest.mark.skipif(not has_vllm(), reason="vLLM's CUDA build is not installed"),
]
SHARE = 0.4
"""Of the GPU, for the server."""
GIB = 1 << 30
LEFT = 7e9
"""Bytes that the planner counts for a sleeping server and an idle trainer together."""
PATIENCE = 60.0
"""Seconds after which an update that does not go on is given up, here."""


def used() -> int:
    """Bytes that all processes hold on the GPU."""
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has a share of the GPU, and may sleep."""
    run_dir = make_run_dir(tmp_path_factory.mktemp("shared"), gpu_memory_fraction=SHARE)
    with running_servers(run_dir) as servers:
        yield servers[0]


def test_a_server_gives_its_memory_up_and_serves_handed_over_weights(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GSPO_JOB_KEY", KEY)
    device = torch.device("cuda", 0)
    total = torch.cuda.mem_get_info()[1]
    controller = ControllerThread([server.url], tmp_path / "samples", overlaps=False, sleeps=True)
    client = ControllerClient(controller.url, KEY)
    try:
        client.wait_ready(HANG)
        assert used() < LEFT, "asleep from the start"
        sender, layout = WeightSender(device, shares=True), Layout(1)
        for version, oracle in enumerate((Oracle(0), Oracle(1))):
            ticket = client.begin_update(update_request(version, ARCH, "float32", layout, [device_name(device)]))
            assert used() < 0.5 * SHARE * total, "weights are awake, KV is not"
            shard = {name: value.to(device) for name, value in cut_shards(ARCH, layout, oracle.tensors)[0].items()}
            checksums = sender.send(ticket, 0, shard)
            report = client.finish_update(update_check(version, checksums, oracle.probes()))
            assert report.largest < 1e-3 and report.received_over_needed == 1.0
            assert used() > 0.8 * SHARE * total, "KV is awake"
            assert len(client.rollout(RolloutRequest(step=version)).samples) == 32
            client.sleep()
            assert used() < LEFT
        sender.close()
    finally:
        client.close()
        controller.stop()


def test_a_run_on_one_shared_gpu(tmp_path: Path) -> None:
    overrides = (
        f"placement.gpu={find_gpus()[0]}", "placement.gpus_per_node=1", "model.dtype=bfloat16",
        "weight_update.canary_bound=0.5", "rollout.gpu_memory_fraction=0.6", "cold_start.steps=3",
        "cold_start.batch_size=8", "batch.prompts=8", "batch.answers=4", "trainer.max_steps=3", "data.held_out=32",
        "evaluation.problems=16", "checkpoint.every=1", "checkpoint.export_every=2", f"run.directory={tmp_path}/run",
        f"cold_start.cache={tmp_path}/cold_start",
    )  # fmt: skip
    command = [sys.executable, "-m", "gspo_megatron.cli", "train", "recipes/tiny_moe.yaml", *overrides]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert said.returncode == 0, said.stdout[-2000:] + said.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["received_over_needed"] == 1.0 for row in rows)
    assert all(row["device_bytes_at_rest"] < LEFT for row in rows[1:])
    assert (tmp_path / "run" / "checkpoints" / "hugging_face_000002" / "config.json").is_file()


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="it needs three NVIDIA GPUs: a trainer and two servers")
def test_a_server_killed_during_an_update_over_nccl_ends_neither_trainer_nor_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer is this process: that it is here to see the end is the first thing that is tested."""
    device, layout, (old, new) = torch.device("cuda", 0), Layout(1), (Oracle(0), Oracle(1))
    shards = [
        {name: value.to(device) for name, value in cut_shards(ARCH, layout, oracle.tensors)[0].items()}
        for oracle in (old, new)
    ]
    recipe = make_recipe()
    patient = recipe.weight_update.model_copy(update={"timeout": PATIENCE})
    with ExitStack() as stack:
        servers: list[Server] = []
        for gpu in list_gpus()[1:3]:
            monkeypatch.setenv(VARIABLE, gpu.name)
            run_dir = make_run_dir(tmp_path / f"server-{len(servers)}", gpu_memory_fraction=SHARE)
            servers += stack.enter_context(running_servers(run_dir))
            monkeypatch.undo()
        controller, link = open_controller(
            stack, servers, tmp_path / "samples", recipe.model_copy(update={"weight_update": patient})
        )
        sender = WeightSender(device, shares=False)
        stack.callback(sender.close)
        ticket = link.begin_update(update_request(0, ARCH, "float32", layout))
        link.finish_update(update_check(0, sender.send(ticket, 0, shards[0]), old.probes()))
        ticket = link.begin_update(update_request(1, ARCH, "float32", layout))
        os.killpg(servers[0].process.pid, signal.SIGKILL)
        with pytest.raises(TransferError):
            sender.send(ticket, 0, shards[1])
        ticket = link.begin_update(update_request(1, ARCH, "float32", layout))
        report = link.finish_update(update_check(1, sender.send(ticket, 0, shards[1]), new.probes()))
        assert list(report.servers) == [servers[1].url] and report.largest < 1e-3
        batch = link.rollout(RolloutRequest(step=1))
        assert differences(new, controller.store, list(batch.samples)).max() < 1e-3
        assert {segment.version for ref in batch.samples for segment in ref.segments} == {1}
