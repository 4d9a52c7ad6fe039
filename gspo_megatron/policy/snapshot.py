"""The policy's part of a checkpoint: every value the next optimizer step depends on, readable by any other layout.

A rank writes one safetensors file. An entry is a run of one local parameter, flattened: its values as the optimizer
steps them (float32 where the weights are bfloat16) and its two moments; with the distributed optimizer the run that
this rank steps, else the whole. The weight table says which rectangle of which Hugging Face tensor a local parameter
is made of, for the layout that wrote and for the one that reads, so a reader picks the bytes it needs and every
reshard is a copy.

    rank_00003.safetensors      value/0/decoder.layers.0.mlp.router.weight, exp_avg/0/..., rng/cpu, ...
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from gspo_megatron.models.hf_table import Parameter, trained_parameters
from gspo_megatron.policy.policy import Policy

VALUE = "value"
MOMENTS = ("exp_avg", "exp_avg_sq")
RANDOM = "rng/"
TYPE_NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8",
}  # fmt: skip
ALIGNMENT = 64
SAVE = "save"
"""Key of the token of a save: in the metadata of every file of a checkpoint, and in its state."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """A run of one local parameter, as an optimizer of this rank steps it."""

    entry: Parameter
    """The local parameter."""
    weight: Tensor
    """The weight that the model computes with, in the entry's shape."""
    main: Tensor
    """The values that the optimizer steps: the weight itself, a float32 copy, or a part of one."""
    start: int
    """Place of its first element in the flattened parameter."""
    optimizer: torch.optim.Optimizer
    """The optimizer that holds the moments in its state."""
    spread: bool
    """Whether each replica of this parameter steps a part of it."""


def rank_file(directory: Path, rank: int) -> Path:
    """The file of a rank's part."""
    return directory / f"rank_{rank:05d}.safetensors"


def stepped(policy: Policy) -> Iterator[Stepped]:
    """Runs that this rank's optimizers step, one a local parameter; none for a parameter that other ranks step."""
    outer = policy.optimizer
    parts = getattr(outer, "chained_optimizers", [outer])
    groups = [part.optimizer.param_groups if part.optimizer is not None else [] for part in parts]
    held = [{id(main) for group in found for main in group["params"]} for found in groups]
    for entry, weight in policy.weights.trained():
        for part, mains in zip(parts, held, strict=True):
            if isinstance(part, DistributedOptimizer):
                if weight in part.model_param_group_index_map:
                    group, order = part.model_param_group_index_map[weight]
                    main = part.optimizer.param_groups[group]["params"][order]
                    start = part._get_model_param_range_map(weight)["param"].start
                    yield Stepped(entry, weight, main, start, part.optimizer, spread=True)
            else:
                main = getattr(weight, "main_param", None)
                main = weight if main is None else main
                if id(main) in mains:
                    yield Stepped(entry, weight, main, 0, part.optimizer, spread=False)


def optimizer_steps(policy: Policy) -> int:
    """Steps that the moments have seen; every parameter has seen the same."""
    for run in stepped(policy):
        state = run.optimizer.state.get(run.main, {})
        groups = [group["step"] for group in run.optimizer.param_groups if "step" in group]
        return int(policy.read(state["step"])) if "step" in state else int(max(groups, default=0))
    return 0


class Snapshot:
    """A copy of this rank's part in host memory, which training cannot change while it is being written.

    The memory is taken once and used again; it is laid out as the file will be.
    """

    def __init__(self) -> None:
        self._layout: list[tuple[str, str, int]] = []
        self._header: dict[str, Any] = {}
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """What one save copies and writes."""
        return self._memory.numel()

    def take(self, policy: Policy) -> None:
        """Copy the present state. Training stands still for as long as this takes."""
        tensors = dict(_written(policy))
        layout = [(name, TYPE_NAMES[tensor.dtype], tensor.numel()) for name, tensor in tensors.items()]
        if layout != self._layout:
            self._lay_out(layout, tensors)
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._slots[name].copy_(policy.read(tensor.detach()).view(-1), non_blocking=True)
        if policy.device.type == "cuda":
            torch.cuda.synchronize()

    def write(self, file: Path, save: str) -> None:
        """Write the copy and wait until it is on the disk.

        Args:
            file: to write.
            save: token of this save, the same on every rank; the file's metadata holds it.
        """
        text = json.dumps({"__metadata__": {SAVE: save}, **self._header}).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        with file.open("wb", buffering=0) as opened:
            for part in (memoryview(header), memoryview(self._memory.numpy())):
                while part:
                    part = part[opened.write(part) :]
            os.fsync(opened.fileno())

    def _lay_out(self, layout: list[tuple[str, str, int]], tensors: dict[str, Tensor]) -> None:
        header: dict[str, Any] = {}
        end = 0
        for name, type_name, numel in layout:
            begin = end
            end = begin + numel * tensors[name].element_size()
            header[name] = {"dtype": type_name, "shape": [numel], "data_offsets": [begin, end]}
        self._layout, self._header = layout, header
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        self._memory = torch.zeros(end, dtype=torch.uint8, pin_memory=pinned)
        self._slots = {
            name: self._memory[slice(*header[name]["data_offsets"])].view(tensor.dtype)
            for name, tensor in tensors.items()
        }


def _written(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Name and live tensor of everything that this rank writes; widest elements first, so that each is aligned."""
    found: list[tuple[str, Tensor]] = []
    elsewhere = _written_by_another_tensor_rank(policy)
    for run in stepped(policy):
        replica = policy.at.expert_data if run.entry.expert else policy.at.data or policy.at.context
        if run.entry.name not in elsewhere and (run.spread or not replica):
            state = run.optimizer.state.get(run.main, {})
            parts = {VALUE: run.main, **{kind: state[kind] for kind in MOMENTS if kind in state}}
            found += [(f"{kind}/{run.start}/{run.entry.name}", tensor) for kind, tensor in parts.items()]
    found += [(f"{RANDOM}{name}", state) for name, state in random_states().items()]
    return iter(sorted(found, key=lambda named: -named[1].element_size()))


def _written_by_another_tensor_rank(policy: Policy) -> set[str]:
    """Parameters that the first tensor-parallel rank beside this one holds in the very same form."""
    layout, rank = policy.layout, policy.weights.rank
    if policy.at.tensor == 0:
        return set()
    beside = layout.coordinates(rank - policy.at.tensor)
    theirs = {
        entry.name: entry.pieces
        for chunk in range(layout.virtual)
        for entry in trained_parameters(policy.weights.arch, layout, beside, chunk)
    }
    mine = [entry for entry, _ in policy.weights.trained() if not entry.expert]
    return {entry.name for entry in mine if theirs.get(entry.name) == entry.pieces}


def random_states() -> dict[str, Tensor]:
    """The generators of this rank, as bytes. Nothing draws from them while dropout is off; a plugin may."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tracker: Any = get_cuda_rng_tracker()
    return states | {f"tracker/{name}": state for name, state in tracker.get_states().items()}


def restore_random_states(states: dict[str, Tensor]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states.pop("cpu"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states({name.removeprefix("tracker/"): state for name, state in states.items()})
