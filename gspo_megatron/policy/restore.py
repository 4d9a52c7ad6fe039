"""Reads a checkpoint of any layout into the policy of this one, piece by piece. Needs no other rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.hf_table import Parameter, Piece, trained_parameters
from gspo_megatron.parallel import Layout
from gspo_megatron.policy.policy import Policy
from gspo_megatron.policy.snapshot import MOMENTS, RANDOM, VALUE, Stepped, rank_file, restore_random_states, stepped

Source = tuple[Parameter, Piece, list[int]]
"""A local parameter of the layout that wrote, its piece of the tensor, and the ranks that held it."""


class SavedPolicy:
    """A checkpoint's tensors under their Hugging Face names, whatever layout wrote them."""

    def __init__(self, directory: Path, arch: Architecture, layout: Layout) -> None:
        self.directory, self.arch, self.layout = directory, arch, layout
        self._sources: dict[str, dict[object, Source]] = {}
        self._files: dict[int, _RankFile] = {}
        for rank in range(layout.world):
            at = layout.coordinates(rank)
            for chunk in range(layout.virtual):
                for entry in trained_parameters(arch, layout, at, chunk):
                    for piece in entry.pieces:
                        held = self._sources.setdefault(piece.tensor, {})
                        held.setdefault((piece.rows, piece.columns), (entry, piece, []))[2].append(rank)

    def read(self, kind: str, piece: Piece) -> Tensor:
        """A rectangle of a tensor's values or moments.

        Raises:
            ValueError: the checkpoint does not hold all of it.
        """
        out: Tensor | None = None
        wanted = piece.columns or (0, 1)
        missing = torch.Size(piece.shape).numel()
        for entry, source, ranks in self._sources.get(piece.tensor, {}).values():
            rows, columns = _overlap(piece.rows, source.rows), _overlap(piece.columns, source.columns)
            if rows is None or columns is None:
                continue
            width = entry.shape[1] if len(entry.shape) > 1 else 1
            first = source.at[0] + rows[0] - source.rows[0]
            height = rows[1] - rows[0]
            flat = self._flat(kind, entry.name, ranks, first * width, (first + height) * width)
            left = columns[0] - (source.columns or (0, 1))[0]
            part = flat.view(height, width)[:, left : left + columns[1] - columns[0]]
            if out is None:
                out = torch.empty((piece.rows[1] - piece.rows[0], wanted[1] - wanted[0]), dtype=flat.dtype)
            at = columns[0] - wanted[0]
            out[rows[0] - piece.rows[0] : rows[1] - piece.rows[0], at : at + part.shape[1]] = part
            missing -= part.numel()
        if out is None or missing:
            raise ValueError(f"{self.directory} lacks {missing} elements of {kind} of {piece.tensor}; use another one")
        return out.view(piece.shape)

    def has_moments(self) -> bool:
        """Whether an optimizer had stepped when it was written."""
        return any(name.startswith(MOMENTS[0]) for rank in range(self.layout.world) for name in self._file(rank).names)

    def random_states(self, rank: int) -> dict[str, Tensor]:
        """The generators of the rank that wrote."""
        file = self._file(rank)
        return {n.removeprefix(RANDOM): file.handle.get_tensor(n) for n in file.names if n.startswith(RANDOM)}

    def _flat(self, kind: str, name: str, ranks: list[int], start: int, end: int) -> Tensor:
        """Elements [start, end) of a flattened local parameter, out of the runs that its holders wrote."""
        out: Tensor | None = None
        missing = end - start
        for rank in ranks:
            file = self._file(rank)
            for begin, length, entry in file.runs.get((kind, name), ()):
                low, high = max(start, begin), min(end, begin + length)
                if low >= high or not missing:
                    continue
                part = file.handle.get_slice(entry)[low - begin : high - begin]
                if out is None:
                    out = torch.empty(end - start, dtype=part.dtype)
                out[low - start : high - start] = part
                missing -= high - low
        if out is None or missing:
            raise ValueError(f"{self.directory} lacks {missing} elements of {kind} of {name}; use another one")
        return out

    def _file(self, rank: int) -> _RankFile:
        if rank not in self._files:
            self._files[rank] = _RankFile(rank_file(self.directory, rank))
        return self._files[rank]


class _RankFile:
    """One rank's file, opened once."""

    def __init__(self, path: Path) -> None:
        self.handle = safe_open(path, framework="pt")
        self.names = list(self.handle.keys())
        self.runs: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for entry in self.names:
            if not entry.startswith(RANDOM):
                kind, start, name = entry.split("/", 2)
                length = self.handle.get_slice(entry).get_shape()[0]
                self.runs.setdefault((kind, name), []).append((int(start), length, entry))


def restore(policy: Policy, saved: SavedPolicy, steps: int) -> None:
    """Put a checkpoint's weights and optimizer into a policy with a fresh optimizer.

    Args:
        policy: of the same architecture, in any layout.
        saved: the checkpoint.
        steps: optimizer steps that its moments have seen.
    """
    with_moments = saved.has_moments()
    runs = {run.entry.name: run for run in stepped(policy)}
    with torch.no_grad():
        for entry, weight in policy.weights.trained():
            whole = _local(entry, partial(saved.read, VALUE))
            # Also what other replicas step: it is read here, not sent.
            weight.copy_(whole)
            if entry.name in runs:
                _fill(runs[entry.name], whole, saved, MOMENTS if with_moments else (), steps)
    if saved.layout == policy.layout:
        restore_random_states(saved.random_states(policy.weights.rank))


def _fill(run: Stepped, whole: Tensor, saved: SavedPolicy, kinds: tuple[str, ...], steps: int) -> None:
    """Put values and moments where the optimizer steps them."""
    run.main.view(-1).copy_(_part(run, whole))
    for kind in kinds:
        moment = _part(run, _local(run.entry, partial(saved.read, kind)))
        run.optimizer.state[run.main][kind] = moment.view(run.main.shape).to(run.main.device, copy=True)
    if kinds:
        _set_steps(run, steps)


def _set_steps(run: Stepped, steps: int) -> None:
    """torch counts steps in a tensor of each parameter, fused optimizers in a number of the group."""
    if isinstance(run.optimizer, torch.optim.Adam | torch.optim.AdamW):
        # One tensor each: a shared one would be counted up by every parameter.
        run.optimizer.state[run.main]["step"] = torch.tensor(float(steps))
    else:
        for group in run.optimizer.param_groups:
            group["step"] = steps


def _local(entry: Parameter, read: Callable[[Piece], Tensor]) -> Tensor:
    """A whole local parameter."""
    parts = sorted(entry.pieces, key=lambda piece: piece.at)
    return torch.cat([read(piece).view(piece.at[1] - piece.at[0], -1) for piece in parts]).view(entry.shape)


def _part(run: Stepped, whole: Tensor) -> Tensor:
    return whole.view(-1)[run.start : run.start + run.main.numel()]


def _overlap(one: tuple[int, int] | None, other: tuple[int, int] | None) -> tuple[int, int] | None:
    """The common range; a vector has one column."""
    (a, b), (c, d) = one or (0, 1), other or (0, 1)
    low, high = max(a, c), min(b, d)
    return (low, high) if low < high else None
