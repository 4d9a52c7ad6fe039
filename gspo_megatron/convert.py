"""`gspo convert`: a checkpoint of any layout to a Hugging Face directory, and a Hugging Face directory to a layout.

One process without process groups: the weight table says where every rectangle lies. At most one Hugging Face tensor,
or the share of one rank, is in memory.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from gspo_megatron.config import Recipe, save_resolved
from gspo_megatron.config.loading import RecipeError, refuse
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.data.model_directory import write_tokenizer
from gspo_megatron.models import load_resolved
from gspo_megatron.models.hf_table import Piece, hf_shapes, local_parameters
from gspo_megatron.own_directory import LAYOUT, replace_directory
from gspo_megatron.parallel import Layout, layout_of
from gspo_megatron.policy.restore import SavedPolicy
from gspo_megatron.policy.snapshot import VALUE, rank_file
from gspo_megatron.policy.weights import ReadPiece, safetensors_pieces, save_hf, write_tensors
from gspo_megatron.run_dir import CheckpointDir, RunDir


def convert(source: Path, out: Path, recipe: Recipe | None) -> str:
    """Convert in the direction that the source asks for; returns what was done, in a sentence.

    Raises:
        ValueError: the source is neither, or does not hold the model, all faults in one sentence; or `out` holds what
            is not ours.
    """
    if out.resolve().is_relative_to(source.resolve()):
        raise refuse("out-in-source", "OUT", f"{out} lies in {source}, which is read", "name a directory beside it")
    checkpoint = CheckpointDir(source)
    if checkpoint.state.is_file():
        recipe = load_resolved(checkpoint.recipe)
        fault = to_hugging_face(source, recipe, out)
        lacks = f", but no tokenizer ({fault}): put its files there" if fault else ""
        return f"{out} holds the weights of {source} as {recipe.model.dtype}, under their Hugging Face names{lacks}"
    if recipe is None or recipe.trainer.ranks is None:
        raise ValueError(
            f"{source} is no checkpoint ({checkpoint.state.name} is missing); to cut a Hugging Face directory, name "
            "the recipe with the layout that it is for, and trainer.ranks"
        )
    layout = layout_of(recipe.trainer, recipe.trainer.ranks)
    to_layout(source, recipe, layout, out)
    return f"{out} holds the weights of {source} as {layout.world} trainer ranks hold them"


def to_hugging_face(checkpoint: Path, recipe: Recipe, out: Path) -> str:
    """Write the weights of a checkpoint, in the type of its recipe, with the tokenizer of the run.

    Returns:
        Why there is no tokenizer, or an empty text.
    """
    arch = recipe.arch
    with _refuse_damaged(checkpoint):
        layout = Layout(**json.loads(CheckpointDir(checkpoint).state.read_text())["layout"])
        saved = SavedPolicy(checkpoint, arch, layout)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in hf_shapes(arch).items():
            with _refuse_damaged(checkpoint):
                whole = saved.read(VALUE, _whole(name, shape))
            yield name, whole.to(getattr(torch, recipe.model.dtype))

    faults: list[str] = []

    def complete(directory: Path) -> None:
        try:
            # Beside the checkpoints of a run; a checkpoint that lies elsewhere has the paths of its recipe.
            write_tokenizer(recipe, RunDir(checkpoint.resolve().parent.parent).tokenizer, directory)
        except RecipeError as error:
            faults.extend(finding.message for finding in error.findings)

    save_hf(tensors(), arch.to_hugging_face(recipe.model.dtype), out, "OUT", complete)
    return "; ".join(faults)


@contextlib.contextmanager
def _refuse_damaged(checkpoint: Path) -> Iterator[None]:
    """Turn what a broken file raises into one sentence. Raises ValueError."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{checkpoint} is damaged ({what}); convert another checkpoint of the run") from None


def to_layout(source: Path, recipe: Recipe, layout: Layout, out: Path) -> None:
    """A Hugging Face directory in the files of a checkpoint that no optimizer has touched."""
    arch = recipe.arch
    read = safetensors_pieces(source, arch)
    with replace_directory(out, LAYOUT, "OUT") as partial:
        _cut(partial, arch, layout, read)
        CheckpointDir(partial).state.write_text(json.dumps({"layout": asdict(layout)}))
        save_resolved(recipe, CheckpointDir(partial).recipe)


def _cut(directory: Path, arch: Architecture, layout: Layout, read: ReadPiece) -> None:
    """Write the share of every rank."""
    written: set[tuple[object, ...]] = set()
    for rank in range(layout.world):
        held: dict[str, Tensor] = {}
        for chunk in range(layout.virtual):
            for entry in local_parameters(arch, layout, layout.coordinates(rank), chunk):
                if (entry.name, entry.pieces) not in written:
                    written.add((entry.name, entry.pieces))
                    held[f"{VALUE}/0/{entry.name}"] = _fill(entry.shape, entry.pieces, read)
        write_tensors(held, rank_file(directory, rank))


def _fill(shape: tuple[int, ...], pieces: tuple[Piece, ...], read: ReadPiece) -> Tensor:
    """A flattened local parameter, float32 as an optimizer steps it."""
    whole = torch.empty(shape)
    for piece in pieces:
        whole[slice(*piece.at)] = read(piece)
    return whole.view(-1)


def _whole(name: str, shape: tuple[int, ...]) -> Piece:
    return Piece(name, (0, shape[0]), (0, shape[1]) if len(shape) == 2 else None, (0, shape[0]))
