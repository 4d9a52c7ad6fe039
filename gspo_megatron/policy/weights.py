"""Weights of this rank from and to Hugging Face tensors, through the weight table of `models/`."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.hf_table import Parameter, Piece, critic_parameters, hf_shapes, local_parameters
from gspo_megatron.models.manifest import TensorMeta
from gspo_megatron.models.weight_files import INDEX_FILE, find_weights
from gspo_megatron.own_directory import HUGGING_FACE, replace_directory
from gspo_megatron.parallel import Layout

ReadPiece = Callable[[Piece], Tensor]
Values = Callable[[torch.nn.Parameter], Tensor]
SHARD_BYTES = 2**30
"""Largest file that is written; its tensors lie in host memory until it is full."""


class ShardedWeights:
    """The parameters of this rank's model chunks under their global names."""

    def __init__(self, arch: Architecture, layout: Layout, rank: int, chunks: Sequence[torch.nn.Module]) -> None:
        self.arch, self.layout, self.rank = arch, layout, rank
        at = layout.coordinates(rank)
        self.parameters: dict[str, tuple[Parameter, torch.nn.Parameter]] = {}
        """What an export and the servers get."""
        self.critic: dict[str, tuple[Parameter, torch.nn.Parameter]] = {}
        """What only trainer and checkpoints know."""
        for index, chunk in enumerate(chunks):
            described = {entry.name: entry for entry in local_parameters(arch, layout, at, index)}
            layers = layout.layers(arch.num_hidden_layers, at.pipeline, index)
            valued = {entry.name: entry for entry in critic_parameters(arch, layout, at, index)}
            first_expert = at.expert * (arch.num_experts // layout.expert)
            for local_name, parameter in chunk.named_parameters():
                name = global_name(local_name, layers, first_expert)
                entry = valued[name] if name in valued else described.pop(name)
                if tuple(parameter.shape) != entry.shape:
                    raise ValueError(
                        f"{name} has shape {tuple(parameter.shape)}, the table says {entry.shape}; the table is wrong"
                    )
                (self.critic if name in valued else self.parameters)[name] = (entry, parameter)
            if described:
                raise ValueError(f"the model lacks {sorted(described)}; the table is wrong")

    def trained(self) -> Iterator[tuple[Parameter, torch.nn.Parameter]]:
        """Everything that an optimizer steps."""
        yield from self.parameters.values()
        yield from self.critic.values()

    def load(self, read: ReadPiece) -> None:
        """Fill the parameters from pieces of Hugging Face tensors; a value head keeps what it has."""
        with torch.no_grad():
            for entry, parameter in self.parameters.values():
                for piece in entry.pieces:
                    parameter[piece.at[0] : piece.at[1]].copy_(read(piece))

    def export(self, batch_bytes: int, values: Values = torch.Tensor.detach) -> Iterator[tuple[str, Tensor]]:
        """Every Hugging Face tensor, whole, in manifest order, on rank 0; the other ranks send and yield nothing.

        A collective: every rank must exhaust it. Each rectangle is sent by the lowest rank that holds it.

        Args:
            batch_bytes: most bytes gathered at one time.
            values: what to export of each parameter: itself, or a tensor of its shape, e.g. its gradient.
        """
        self._values = values
        owners = self._owners()
        batch: dict[str, list[tuple[int, str, Piece]]] = {}
        held = 0
        for meta in self.manifest():
            if batch and held + meta.num_bytes > batch_bytes:
                yield from self._gather_batch(batch)
                batch, held = {}, 0
            batch[meta.name] = owners[meta.name]
            held += meta.num_bytes
        yield from self._gather_batch(batch)

    def manifest(self) -> list[TensorMeta]:
        """Every Hugging Face tensor, in file order."""
        dtype = str(next(iter(self.parameters.values()))[1].dtype).removeprefix("torch.")
        return [TensorMeta(name, dtype, shape) for name, shape in hf_shapes(self.arch).items()]

    def _owners(self) -> dict[str, list[tuple[int, str, Piece]]]:
        """For each Hugging Face tensor its rectangles: (rank that sends it, parameter, piece)."""
        owners: dict[str, dict[tuple[object, ...], tuple[int, str, Piece]]] = {
            name: {} for name in hf_shapes(self.arch)
        }
        for rank in range(self.layout.world):
            at = self.layout.coordinates(rank)
            for chunk in range(self.layout.virtual):
                for entry in local_parameters(self.arch, self.layout, at, chunk):
                    for piece in entry.pieces:
                        owners[piece.tensor].setdefault((piece.rows, piece.columns), (rank, entry.name, piece))
        return {name: list(found.values()) for name, found in owners.items()}

    def _gather_batch(self, batch: dict[str, list[tuple[int, str, Piece]]]) -> Iterator[tuple[str, Tensor]]:
        senders = sorted({rank for pieces in batch.values() for rank, _, _ in pieces} - {0})
        if self.rank in senders:
            dist.send(torch.cat([part.reshape(-1) for part in self._pieces_of(batch, self.rank)]), dst=0)
        if self.rank:
            return
        shapes = hf_shapes(self.arch)
        sample = self._values(next(iter(self.parameters.values()))[1])
        whole = {name: sample.new_empty(shapes[name], requires_grad=False) for name in batch}
        for rank in (0, *senders):
            wanted = [(name, piece) for name, pieces in batch.items() for owner, _, piece in pieces if owner == rank]
            parts = self._pieces_of(batch, 0) if rank == 0 else _receive(rank, [piece for _, piece in wanted], sample)
            for (name, piece), part in zip(wanted, parts, strict=True):
                target = whole[name][slice(*piece.rows)]
                (target if piece.columns is None else target[:, slice(*piece.columns)]).copy_(part)
        yield from whole.items()

    def _pieces_of(self, batch: dict[str, list[tuple[int, str, Piece]]], rank: int) -> list[Tensor]:
        return [
            self._values(self.parameters[parameter][1])[slice(*piece.at)]
            for pieces in batch.values()
            for owner, parameter, piece in pieces
            if owner == rank
        ]


def _receive(rank: int, pieces: list[Piece], like: Tensor) -> list[Tensor]:
    sizes = [torch.Size(piece.shape).numel() for piece in pieces]
    flat = like.new_empty(sum(sizes), requires_grad=False)
    dist.recv(flat, src=rank)
    return [part.view(piece.shape) for part, piece in zip(flat.split(sizes), pieces, strict=True)]


def global_name(local_name: str, layers: range, first_expert: int) -> str:
    """The table's name of a parameter of a model chunk, in either layer spec.

    `decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight` on a chunk that starts at layer 12 and expert 4 is
    `decoder.layers.12.mlp.experts.5.linear_fc1.weight`; so is Transformer Engine's `....experts.linear_fc1.weight1`.
    """
    name = re.sub(r"^decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{layers[int(m[1])]}.", local_name)
    name = re.sub(r"\.local_experts\.(\d+)\.", lambda m: f".{first_expert + int(m[1])}.", name)
    name = re.sub(
        r"\.experts\.(linear_fc[12])\.weight(\d+)$",
        lambda m: f".experts.{first_expert + int(m[2])}.{m[1]}.weight",
        name,
    )
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    return name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


def random_pieces(arch: Architecture, seed: int) -> ReadPiece:
    """A reader of random weights that depend on the seed and the tensor's name, so on no layout.

    Weights of norms are 1. Biases are random too, so that one at the wrong place changes the output.
    """
    shapes = hf_shapes(arch)

    def read(piece: Piece) -> Tensor:
        shape = shapes[piece.tensor]
        if len(shape) == 1 and not piece.tensor.endswith(".bias"):
            return torch.ones(piece.shape)
        digest = hashlib.sha256(f"{seed}/{piece.tensor}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        whole = torch.empty(shape).normal_(0.0, arch.initializer_range, generator=generator)
        return whole[slice(*piece.rows)] if piece.columns is None else whole[slice(*piece.rows), slice(*piece.columns)]

    return read


def safetensors_pieces(directory: Path, arch: Architecture) -> ReadPiece:
    """A reader of a Hugging Face directory that reads only the bytes of each requested piece.

    Raises:
        ValueError: files, names, shapes and types that do not fit the architecture, all of them in one sentence.
    """
    weights = find_weights(directory, arch)
    if weights.faults:
        raise ValueError(f"{directory} does not hold this model: {'; '.join(sorted(weights.faults))}")
    files = weights.places
    handles = {file: safe_open(file, framework="pt") for file in set(files.values())}

    def read(piece: Piece) -> Tensor:
        view = handles[files[piece.tensor]].get_slice(piece.tensor)
        rows = slice(*piece.rows)
        return view[rows] if piece.columns is None else view[rows, slice(*piece.columns)]

    return read


def save_hf(
    tensors: Iterator[tuple[str, Tensor]],
    config: dict[str, Any],
    directory: Path,
    key: str = "directory",
    complete: Callable[[Path], None] | None = None,
) -> None:
    """Write a Hugging Face directory, under another name until it is whole.

    Args:
        tensors: by their Hugging Face names.
        config: what config.json holds.
        directory: missing, empty, or an older export.
        key: recipe key or argument that names it, or the run directory that it lies in.
        complete: adds files to it, before it appears under its name.

    Raises:
        RecipeError: the place is not ours, or cannot be written.
    """
    with replace_directory(directory, HUGGING_FACE, key) as partial:
        _save_tensors(tensors, partial)
        (partial / "config.json").write_text(json.dumps(config, indent=1))
        if complete is not None:
            complete(partial)


def write_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode of any other new file: the library's own is for its owner alone.

    Raises:
        OSError: it cannot be written; with its name.
    """
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(file)) from None
    file.chmod(mode)


def _save_tensors(tensors: Iterator[tuple[str, Tensor]], directory: Path) -> None:
    """Write tensors as they come into numbered safetensors files with an index, at most SHARD_BYTES each."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        write_tensors(held, directory / f"model-{len(shards) + 1:05d}.safetensors", {"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and sum(part.nbytes for part in held.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        held[name] = tensor.cpu().contiguous()
        total += tensor.nbytes
    flush()
    weight_map = {name: f"model-{number:05d}.safetensors" for number, names in enumerate(shards, 1) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1))
