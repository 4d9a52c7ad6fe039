"""Loads and saves a model of some hundred MB; prints the peaks of anonymous memory as JSON."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import Piece, local_parameters
from gspo_megatron.parallel import Layout
from gspo_megatron.policy import weights

OVERRIDES = [
    f"model.architecture.{value}"
    for value in (
        "model_type=qwen3", "num_experts=0", "num_experts_per_tok=0", "moe_intermediate_size=0", "vocab_size=32768",
        "hidden_size=512", "intermediate_size=4096", "num_hidden_layers=8", "tie_word_embeddings=true",
    )
]  # fmt: skip
"""67 MB of embedding and 8 layers of 30 MB, in float32."""
SHARD_BYTES = 48 * 2**20
"""Several files; the embedding has one of its own."""
BATCH_BYTES = 2**20


CASES = {"one rank": (Layout(1), 0), "rank 1 of TP2": (Layout(2, tensor=2), 1), "all at once": (Layout(1), 0)}


def main() -> None:
    """Write the model, then measure each case in a process of its own."""
    arch = load_recipe(Path("recipes/tiny_moe.yaml"), OVERRIDES).arch
    weights.SHARD_BYTES = SHARD_BYTES
    directory = Path(sys.argv[1])
    tensors = Model(arch, Layout(1), 0).weights.export(BATCH_BYTES)
    weights.save_hf(tensors, arch.to_hugging_face("float32"), directory / "model")
    for number, name in enumerate(CASES):
        if not os.fork():
            (directory / f"{number}.json").write_text(json.dumps(measure(name, arch, directory)))
            os._exit(0)
        _, status = os.wait()
        assert not status, name
    print(json.dumps({name: json.loads((directory / f"{n}.json").read_text()) for n, name in enumerate(CASES)}))


def measure(name: str, arch: Architecture, directory: Path) -> dict[str, int]:
    """Bytes of the rank's parameters, and the peaks of loading them and (all ranks in one) of saving them."""
    layout, rank = CASES[name]
    model = Model(arch, layout, rank)
    found = {"parameters": sum(part.nbytes for part in model.parameters())}
    with peak() as (loading, sample):
        read = weights.safetensors_pieces(directory / "model", arch)
        model.weights.load(sampled(read_at_once(read, arch) if name == "all at once" else read, sample))
    found["loading"] = loading[0]
    if layout.world == 1:
        with peak() as (saving, _):
            tensors = model.weights.export(BATCH_BYTES)
            weights.save_hf(tensors, arch.to_hugging_face("float32"), directory / "saved")
        found["saving"] = saving[0]
    return found


class Model(torch.nn.Module):
    """The parameters of one rank under Megatron's names, every page of them touched."""

    def __init__(self, arch: Architecture, layout: Layout, rank: int) -> None:
        super().__init__()
        for entry in local_parameters(arch, layout, layout.coordinates(rank)):
            *path, last = entry.name.split(".")
            place: torch.nn.Module = self
            for name in path:
                if name not in dict(place.named_children()):
                    place.add_module(name, torch.nn.Module())
                place = place.get_submodule(name)
            place.register_parameter(last, torch.nn.Parameter(torch.zeros(entry.shape).fill_(1.0)))
        self.weights = weights.ShardedWeights(arch, layout, rank, [self])


def read_at_once(read: weights.ReadPiece, arch: Architecture) -> weights.ReadPiece:
    """The loader that the bound is against: every tensor lies in memory before the first is used."""
    held = {
        name: read(Piece(name, (0, shape[0]), (0, shape[1]) if len(shape) == 2 else None, (0, shape[0]))).clone()
        for name, shape in weights.hf_shapes(arch).items()
    }
    return lambda piece: held[piece.tensor][slice(*piece.rows)][
        (..., slice(*piece.columns)) if piece.columns else slice(None)
    ]


def sampled(read: weights.ReadPiece, sample: Callable[[], None]) -> weights.ReadPiece:
    """A reader that looks at the memory while each piece is there."""

    def watched(piece: Piece) -> torch.Tensor:
        part = read(piece)
        sample()
        return part

    return watched


@contextmanager
def peak() -> Iterator[tuple[list[int], Callable[[], None]]]:
    """[most bytes of anonymous memory beyond those at the start], and what looks once more; files' mapped pages are
    not in them."""
    found, start, done = [0], anonymous_bytes(), threading.Event()

    def sample() -> None:
        found[0] = max(found[0], anonymous_bytes() - start)

    def watch() -> None:
        while not done.wait(0.001):
            sample()

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield found, sample
    done.set()
    watcher.join()


def anonymous_bytes() -> int:
    """Of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
