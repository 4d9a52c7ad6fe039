"""One rank of the bfloat16 runs on Transformer Engine's layers: micro-batches, context-parallel attention, offload."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.data.packing import collate
from gspo_megatron.models import load_recipe
from gspo_megatron.policy import mesh
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.policy import OptimizerSettings, Policy, Scored
from gspo_megatron.policy.snapshot import Snapshot
from gspo_megatron.policy.specs import FUSES
from gspo_megatron.policy.weights import random_pieces
from gspo_megatron.types import Sample, SampleRef
from tests.parallel import engine_answers, engine_ring

SEED = 5
HALVES = ((31, 12, 9), (31, 17, 5))
"""Lengths of the sequences of two micro-batches; equal longest ones, so that attention has rows of one length."""
ATTENDED = (512, 96)
"""Lengths of the sequences of the comparison of attention."""
INPUTS = ("output", "queries", "keys", "values")
TOKENS, WIDTH, EXPERTS = 24, 32, 4
ADAM = OptimizerSettings(1e-3, (0.9, 0.95), 1e-8, 0.0, 1.0)


def make_halves(vocab_size: int) -> list[list[Sample]]:
    """Random sequences, trained from their third token on."""
    generator = np.random.default_rng(SEED)
    halves = []
    for lengths in HALVES:
        halves.append([])
        for size in lengths:
            mask = np.arange(size) > 1
            ref = SampleRef("", 0, 0, 2, size - 2, 0.0, "stop", ())
            token_ids = generator.integers(0, vocab_size, size).astype(np.int32)
            halves[-1].append(Sample(token_ids, mask, np.zeros(size, np.float32), ref))
    return halves


def loss(batch: MicroBatch, now: Scored, _: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A share of a sum over all tokens, whatever micro-batch they are in."""
    return -(now.logprobs * batch.loss_mask).sum() / sum(map(sum, HALVES)), {}


def gradients(policy: Policy, halves: list[list[Sample]], micro_batches: int) -> dict[str, Tensor]:
    """Of every parameter of this rank, from the same sequences in one or in two micro-batches."""
    members = halves if micro_batches == 2 else [[*halves[0], *halves[1]]]
    policy.start_optimizer(ADAM)
    batches = policy.place([collate(one, policy.layout.pad_multiple) for one in members])
    policy.train(batches, loss, 0.0)
    return {name: held.main_grad.clone() for name, (_, held) in policy.weights.parameters.items()}  # type: ignore[union-attr]


def compare_micro_batches(overrides: list[str], device: torch.device) -> dict[str, Any]:
    """Largest relative distance of the gradients of one and of two micro-batches: of products, and of all others."""
    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), [*overrides, "trainer.distributed_optimizer=false"])
    policy = Policy(recipe, device, torch.bfloat16)
    policy.load(random_pieces(recipe.arch, SEED))
    halves = make_halves(recipe.arch.vocab_size)
    one, two = (gradients(policy, halves, count) for count in (1, 2))
    products = {
        id(weight)
        for chunk in policy.chunks
        for module in chunk.modules()
        if hasattr(module, FUSES)
        for name, weight in module.named_parameters(recurse=False)
        if name.startswith("weight")
    }
    off: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for name, (_, held) in policy.weights.parameters.items():
        off[id(held) in products][name] = float((one[name] - two[name]).norm() / one[name].norm())
    worst = {kind: max(found, key=lambda name: found[name]) for kind, found in off.items()}
    return {
        "products": len(off[True]),
        "rounding": off[True][worst[True]],
        "worst": worst[True],
        "others": {worst[False]: off[False][worst[False]]},
    }


def compare_offload(overrides: list[str], device: torch.device) -> dict[str, Any]:
    """Whether two steps end in the same weights, to the bit, with everything in host memory between them."""
    weights: list[dict[str, Tensor]] = []
    left, saved = 0, 0
    for offloads in (False, True):
        recipe = load_recipe(Path("recipes/tiny_moe.yaml"), overrides)
        policy = Policy(recipe, device, torch.bfloat16)
        policy.load(random_pieces(recipe.arch, SEED))
        policy.start_optimizer(ADAM)
        halves = make_halves(recipe.arch.vocab_size)
        batches = policy.place([collate(one, policy.layout.pad_multiple) for one in halves])
        for _ in range(2):
            policy.train(batches, loss, 1e-3)
            if offloads:
                policy.offload()
                left += sum(w.untyped_storage().nbytes() for chunk in policy.chunks for w in chunk.parameters())
                snapshot = Snapshot()
                snapshot.take(policy)
                saved = snapshot.num_bytes
                policy.restore()
        weights.append({name: held.detach().clone() for name, (_, held) in policy.weights.parameters.items()})
    changed = [name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])]
    return {"left": left, "saved": saved, "tensors": len(weights[0]), "changed": changed}


def compare_attention(overrides: list[str], device: torch.device) -> dict[str, Any]:
    """Relative distances of a layer's attention over all ranks from float64: output, gradients of its inputs."""
    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), overrides)
    policy = Policy(recipe, device, torch.bfloat16)
    core = policy.chunks[0].module.decoder.layers[0].self_attention.core_attention
    refs = [SampleRef("", 0, 0, 2, size - 2, 0.0, "stop", ()) for size in ATTENDED]
    rows = [
        Sample(np.zeros(size, np.int32), np.arange(size) > 0, np.zeros(size, np.float32), ref)
        for size, ref in zip(ATTENDED, refs, strict=True)
    ]
    pack = collate(rows, policy.layout.pad_multiple)
    (batch,) = policy.place([pack])
    generator = torch.Generator().manual_seed(SEED)
    arch = recipe.arch
    heads = (arch.num_attention_heads, arch.num_key_value_heads, arch.num_key_value_heads)
    whole = [torch.randn(len(pack.token_ids), count, arch.head_dim, generator=generator).bfloat16() for count in heads]
    upper = torch.randn(len(pack.token_ids), heads[0] * arch.head_dim, generator=generator).bfloat16()
    mine = [part[batch.indices].requires_grad_() for part in whole]
    out = core(*mine, None, AttnMaskType.causal, packed_seq_params=batch.params).view(len(batch.indices), -1)
    found = [out, *torch.autograd.grad(out, mine, upper[batch.indices])]
    wide = [part.double().requires_grad_() for part in whole]
    exact = attend(wide, pack.cu_seqlens.tolist())
    wanted = [exact, *torch.autograd.grad(exact, wide, upper.double())]
    sums = torch.tensor([
        [(one.double() - all_[batch.indices]).square().sum(), all_[batch.indices].square().sum()]
        for one, all_ in zip(found, wanted, strict=True)
    ])  # fmt: skip
    dist.all_reduce(sums)
    return {"attention": dict(zip(INPUTS, (sums[:, 0] / sums[:, 1]).sqrt().tolist(), strict=True))}


def attend(tensors: list[Tensor], starts: list[int]) -> Tensor:
    """[T, heads * d] causal attention within each sequence, written down."""
    parts = []
    for begin, end in pairwise(starts):
        query, key, value = (part[begin:end].transpose(0, 1) for part in tensors)
        key, value = (part.repeat_interleave(len(query) // len(key), 0) for part in (key, value))
        hidden = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
        parts.append((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))
    return torch.cat(parts)


def reorder(fused: bool) -> dict[str, Tensor]:
    """Tokens to their experts, sorted by another order of experts and back, with all gradients."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, scores.topk(2).indices, True)
    probs = (scores * chosen).requires_grad_()
    count = int(chosen.sum())
    sent, weights, order, *_ = moe_utils.permute(tokens, chosen, probs, num_out_tokens=count, fused=fused)
    turned = torch.arange(EXPERTS).flip(0)
    sizes = chosen.sum(0)
    there, carried = moe_utils.sort_chunks_by_idxs(sent, sizes, turned, probs=weights, fused=fused)
    assert carried is not None
    back, _ = moe_utils.sort_chunks_by_idxs(there * carried[:, None], sizes[turned], turned, fused=fused)
    whole = moe_utils.unpermute(back, order, tokens.shape, routing_map=chosen, fused=fused)
    (whole * torch.randn(whole.shape, generator=generator)).sum().backward()
    assert tokens.grad is not None and probs.grad is not None
    return {"result": whole.detach(), "gradient of tokens": tokens.grad, "gradient of probabilities": probs.grad}


def compare_permutation(_: list[str], __: torch.device) -> dict[str, Any]:
    """Largest relative distance of Triton's reordering and megatron's."""
    own, fused = reorder(False), reorder(True)
    return {"reordered": {name: float((fused[name] - value).norm() / value.norm()) for name, value in own.items()}}


def main() -> None:
    """Run every case of cases.json in one world; results of all ranks go to results.json."""
    directory = Path(sys.argv[1])
    device = mesh.start_world()
    engine_answers.install()
    engine_ring.install()
    runs = {
        "micro-batches": compare_micro_batches,
        "attention": compare_attention,
        "offload": compare_offload,
        "permutation": compare_permutation,
    }
    results: list[Any] = []
    for case in json.loads((directory / "cases.json").read_text()):
        rows: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, runs[case["what"]](case["overrides"], device))
        results.append(rows)
        if dist.get_rank() == 0:
            (directory / "results.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
