"""Measure how long a checkpoint blocks training: `python tools/bench_checkpoint.py [--json]`.

It uses one process and no GPU. One run compares a copy of the same bytes in memory (the lower bound of an asynchronous
save), this package's asynchronous and synchronous saves, and `torch.distributed.checkpoint.async_save`. Each number is
the median of several saves. The first save allocates memory and is reported separately.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.cluster.free_ports import free_ports
from gspo_megatron.models import load_recipe
from gspo_megatron.policy import mesh
from gspo_megatron.policy.policy import OptimizerSettings, Policy
from gspo_megatron.policy.snapshot import MOMENTS, stepped
from gspo_megatron.policy.weights import random_pieces
from gspo_megatron.run_log import RunLog
from gspo_megatron.trainer.checkpoint import CheckpointWriter
from gspo_megatron.transport.messages import Accounting, ControllerState, StreamState, TokenCount

MODEL = (
    "num_hidden_layers=8", "hidden_size=256", "moe_intermediate_size=512", "num_experts=16", "vocab_size=4096",
)  # fmt: skip
"""54 million parameters: 650 MB of weights and moments."""
NAMES = ("copy", "asynchronous", "torch_async_save", "synchronous")
LIMIT = 1.25
"""Most that an asynchronous save may stand still, in copies of its bytes."""


def make_policy() -> Policy:
    """A policy whose optimizer holds moments, as after its first step."""
    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), [f"model.architecture.{setting}" for setting in MODEL])
    policy = Policy(recipe, mesh.start_world())
    policy.load(random_pieces(recipe.arch, 0))
    policy.start_optimizer(OptimizerSettings(1e-4, (0.9, 0.95), 1e-8, 0.0, 1.0))
    for run in stepped(policy):
        state: dict[str, Any] = {kind: torch.rand_like(run.main) for kind in MOMENTS}
        run.optimizer.state[run.main] = {"step": torch.tensor(1.0), **state}
    return policy


class Measurements:
    """Seconds of each way to save, of one repeat after the other so that a busy machine is busy for all of them."""

    def __init__(self, policy: Policy, directory: Path) -> None:
        self.directory, self.seconds = directory, {name: [] for name in NAMES}
        self.tensors = {
            f"{kind}/{run.entry.name}": tensor.detach()
            for run in stepped(policy)
            for kind, tensor in {"value": run.main, **run.optimizer.state[run.main]}.items()
        }
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.source = torch.ones(self.num_bytes, dtype=torch.uint8)
        self.target = torch.empty(self.num_bytes, dtype=torch.uint8)
        self.writer = CheckpointWriter(directory / "checkpoints", 1, RunLog(directory, owns_terminal=False))
        self.trainer: Any = SimpleNamespace(
            policy=policy, version=0, updates=0, skipped=0, objective_sentence=str,
            on_first_rank=lambda ask: (controller_state(), "t"),
        )  # fmt: skip

    def repeat(self, number: int) -> None:
        """Every way once."""
        began = time.perf_counter()
        self.target.copy_(self.source)
        self._note("copy", began)
        began = time.perf_counter()
        self.writer.save(self.trainer, number)
        self._note("asynchronous", began)
        self.writer.wait()
        self._note("synchronous", began)
        began = time.perf_counter()
        future: Any = dcp.async_save(self.tensors, checkpoint_id=self.directory / f"torch_{number}")
        self._note("torch_async_save", began)
        future.result()
        shutil.rmtree(self.directory / f"torch_{number}")

    def _note(self, name: str, began: float) -> None:
        self.seconds[name].append(time.perf_counter() - began)


def controller_state() -> ControllerState:
    """Of a controller between two steps."""
    nothing = Accounting(sampled_tokens=0, taken=TokenCount(), dropped={}, in_flight=TokenCount())
    stream = StreamState(index=0, position=0, skipped={}, fingerprint="")
    return ControllerState(stream=stream, groups=(), accounting=nothing, store="", generations=())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place | {"MASTER_PORT": str(free_ports(1)[0])})
    torch.set_num_threads(1)
    policy = make_policy()
    with tempfile.TemporaryDirectory() as scratch:
        measured = Measurements(policy, Path(scratch))
        for number in range(chosen.repeats + 1):
            measured.repeat(number)
    found = measured.seconds
    copy = statistics.median(found["copy"][1:])
    report = {
        "bytes": measured.num_bytes,
        "repeats": chosen.repeats,
        **{
            name: {
                "seconds": statistics.median(seconds[1:]),
                "copies": statistics.median(seconds[1:]) / copy,
                "first_seconds": seconds[0],
            }
            for name, seconds in found.items()
        },
        "limit_copies": LIMIT,
    }
    print(json.dumps(report, indent=1) if chosen.json else table(report))
    dist.destroy_process_group()


def table(report: dict[str, Any]) -> str:
    """The report for a reader."""
    lines = [f"{report['bytes'] / 1e6:.0f} MB, median of {report['repeats']}:"]
    for name in NAMES:
        row = report[name]
        lines.append(
            f"  {name:18} {row['seconds']:.3f} s  {row['copies']:.2f} copies  (first {row['first_seconds']:.3f} s)"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
