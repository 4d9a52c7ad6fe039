"""Writes where vLLM's own quantiser and ours differ: `python compares_quantisers.py OUT`.

Both quantise the matrices of a model whose blocks lie over the borders of three trainer layouts, and matrices at the
edges of the arithmetic. vLLM's function runs as it is and compiled, as on a server.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from vllm.utils.deep_gemm import per_block_cast_to_fp8

from gspo_megatron.models.hf_table import hf_shapes, local_parameters
from gspo_megatron.models.qwen3.architecture import Qwen3Architecture
from gspo_megatron.models.weight_format import SCALE, WeightFormat, is_quantised
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.weights.quantiser import E4M3, LEAST_MAXIMUM, BlockScales, block_maxima, encode, scales_of
from tests.shards import CPU, cut_shards

FORM = WeightFormat("bfloat16", fp8=True)
ARCH = Qwen3Architecture(
    vocab_size=96, hidden_size=192, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
    intermediate_size=256, moe_intermediate_size=160, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
    max_position_embeddings=128,
)  # fmt: skip
TRAINERS = (Layout(1), Layout(4, tensor=2, pipeline=2, expert=2), Layout(4, tensor=2, expert=2, expert_tensor=2))


def main() -> None:
    """Names of the cases, and how many bytes and scales differ in each."""
    plain = getattr(per_block_cast_to_fp8, "_torchdynamo_orig_callable", None)
    assert plain is not None, "torch hides the function that it compiles elsewhere now"
    quantisers = {"as it is": plain, "compiled": per_block_cast_to_fp8}
    found: dict[str, dict[str, int]] = {}
    for kind, quantise in quantisers.items():
        for name, values, scales, weight in (*of_a_model(), *at_the_edges()):
            theirs, their_scales = quantise(weight, [128, 128], False)
            found[f"{name}, {kind}"] = {
                "values": values.numel(),
                "bytes": int((theirs.view(torch.uint8) != values.view(torch.uint8)).sum()),
                "scales": int((their_scales.view(torch.int32) != scales.view(torch.int32)).sum()),
            }
    Path(sys.argv[1]).write_text(json.dumps(found))


def of_a_model() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(case, our bytes, our scales, matrix) of every matrix of a model, from the shards of each trainer."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (
            0.02 * torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
        ).bfloat16()
        for name, shape in hf_shapes(ARCH).items()
    }
    for trainer in TRAINERS:
        shards = cut_shards(ARCH, trainer, tensors)
        agreed = BlockScales(FORM, ARCH, CPU)
        for rank, shard in enumerate(shards):
            agreed.measure(trainer, rank, shard)
        encoded = {name: torch.zeros(tensors[name].shape, dtype=E4M3) for name in filter(is_quantised, tensors)}
        for rank, shard in enumerate(shards):
            for entry in local_parameters(ARCH, trainer, trainer.coordinates(rank)):
                for piece in entry.pieces:
                    if piece.tensor in encoded and piece.columns is not None:
                        values = shard[entry.name][slice(*piece.at)]
                        place = encoded[piece.tensor][slice(*piece.rows), slice(*piece.columns)]
                        place.copy_(agreed.encode(piece.tensor, piece.rows[0], piece.columns[0], values))
        for name, values in encoded.items():
            yield f"{trainer}, {name}", values, agreed.scales(name + SCALE), tensors[name]


def at_the_edges() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Matrices on which roundings and limits decide."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[every.abs() < 3e38].clone()
    cases: dict[str, Tensor] = {
        "every small number of bfloat16": finite[finite.abs() <= 1.0],
        "every number of bfloat16": finite,
        "zeros": torch.zeros(128 * 128).bfloat16(),
        "below the least scale": finite[finite.abs() < LEAST_MAXIMUM],
        "float32": torch.randn(300 * 200, generator=torch.Generator().manual_seed(1)) * 0.05,
    }
    for name, flat in cases.items():
        weight = flat[: len(flat) // 200 * 200].view(-1, 200)
        scales = scales_of(block_maxima(weight, 0, 0))
        yield name, encode(weight, scales), scales, weight


if __name__ == "__main__":
    main()
