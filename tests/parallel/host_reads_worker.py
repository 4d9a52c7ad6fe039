"""One rank of the test that layers ask the device for nothing: what a run of the schedule reads, to reads-RANK.json."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.data.packing import collate
from gspo_megatron.models import load_recipe
from gspo_megatron.policy import mesh, model
from gspo_megatron.policy.policy import OptimizerSettings, Policy
from gspo_megatron.policy.rotary import rotate
from gspo_megatron.policy.weights import random_pieces
from tests.parallel.policy_batch import make_samples

ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
"""Operators whose result, or the size of it, the host has to read."""
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class HostReads(TorchDispatchMode):
    """Counts what waits for the device, by the innermost line of a layer that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in INDEXED and any(isinstance(at, Tensor) and at.dtype is torch.bool for at in args[1])
        if name.startswith(ASKS) or by_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        """Count one, under the place that asked for it."""
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename][:-2]
        frame = next((frame for frame in reversed(frames) if __file__ not in frame.filename), frames[-1])
        self.seen[f"{name} at {Path(frame.filename).name}:{frame.name}"] += 1


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts while inside; `tolist` passes by the dispatcher."""
    reads, original = HostReads(), Tensor.tolist

    def tolist(self: Tensor) -> Any:
        reads.note("tolist")
        return original(self)

    Tensor.tolist = tolist
    try:
        with reads:
            yield reads.seen
    finally:
        Tensor.tolist = original


def fused_rotation(tokens: Tensor, starts: Tensor, angles: Tensor, **place: Any) -> Tensor:
    """In the place of Transformer Engine's kernel, which needs a GPU; as that, it takes the lengths on the device."""
    size, rank = place["cp_size"], place["cp_rank"]
    own = torch.arange(len(tokens))
    sequence = torch.searchsorted(starts // size, own, right=True) - 1
    offset, chunk = own - starts[sequence] // size, (starts[sequence + 1] - starts[sequence]) // (2 * size)
    last = offset >= chunk
    at = torch.where(last, (2 * size - 2 - rank) * chunk, rank * chunk) + offset
    turned = angles.index_select(0, at)[:, 0]
    return rotate(tokens, torch.stack([turned.cos(), turned.sin()]).to(tokens.dtype))


def main() -> None:
    """Run every case of cases.json in one world."""
    directory = Path(sys.argv[1])
    device = mesh.start_world()
    found = [measure(case, device) for case in json.loads((directory / "cases.json").read_text())]
    (directory / f"reads-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What scoring and the two passes of training read, and the log-probs."""
    settings = model.transformer_config

    def with_kernel(*arguments: Any) -> Any:
        config = settings(*arguments)
        config.apply_rope_fusion = case["fused"]
        return config

    model.transformer_config = with_kernel
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils.fused_apply_rotary_pos_emb_thd = fused_rotation
    policy = Policy(load_recipe(Path("recipes/tiny_moe.yaml"), case["overrides"]), device)
    model.transformer_config = settings
    policy.load(random_pieces(policy.weights.arch, 1))
    policy.start_optimizer(OptimizerSettings(0.0, (0.9, 0.95), 1e-8, 0.0, 1.0))
    samples = make_samples(policy.weights.arch.vocab_size)
    batches = policy.place([collate(samples, policy.layout.pad_multiple)])
    original, seen = policy._run, Counter()

    def run(*arguments: Any, **named: Any) -> Any:
        with counted() as reads:
            results = original(*arguments, **named)
        seen.update(reads)
        return results

    policy._run = run
    (scored,) = policy.score(batches)
    policy.train(batches, lambda _, now, __: (now.logprobs.sum(), {}), 0.0)
    return {"reads": seen, "logprobs": scored.logprobs.double().tolist()}


if __name__ == "__main__":
    main()
