"""The layouts that `make parity` compares with one process of Hugging Face's model, one a row.

A row's layout is written as it is said: `TP2 PP2 VPP2 EP2` on 4 ranks. Sequence parallelism is on wherever TP is above
1 (megatron-core trains no mixture of experts without it); what TP, PP and CP leave of the ranks is DP.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass

from gspo_megatron.config.schema import Recipe
from gspo_megatron.parallel import layout_of

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "rope_theta": 1.0e4,
    "max_position_embeddings": 128,
    "initializer_range": 0.12,
}
"""Qwen3-MoE in small: top-4 of 8, so that the order of the chosen experts shows."""
DENSE = {"model_type": "qwen3", "num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
QWEN2 = {**SHAPE, **DENSE, "model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2}
"""Qwen2.5 in small: a bias of queries, keys and values, no norm of them."""
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA = {
    **SHAPE, **DENSE, "model_type": "llama", "rms_norm_eps": 1e-5,
    "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192},
}  # fmt: skip
"""Llama 3.1 in small."""
MODELS: dict[str, dict[str, object]] = {
    "moe": SHAPE,
    "moe, 2 KV heads": {**SHAPE, "num_key_value_heads": 2},
    "moe, 6 layers": {**SHAPE, "num_hidden_layers": 6},
    "dense": {**SHAPE, **DENSE},
    "dense, tied": {**SHAPE, **DENSE, "tie_word_embeddings": True},
    "qwen2": QWEN2,
    "qwen2, tied": {**QWEN2, "tie_word_embeddings": True},
    "llama": LLAMA,
    "llama, tied": {**LLAMA, "tie_word_embeddings": True},
}
KEYS = {
    "TP": "tensor_parallel",
    "PP": "pipeline_parallel",
    "VPP": "virtual_pipeline",
    "CP": "context_parallel",
    "EP": "expert_parallel",
    "ETP": "expert_tensor_parallel",
    "first": "first_stage_layers",
    "last": "last_stage_layers",
}
SPREAD = "spread"


def architecture_overrides(model: str) -> list[str]:
    """What a model of MODELS changes in a recipe."""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in MODELS[model].items()}
    return [f"model.architecture.{key}={value}" for key, value in values.items()]


WORDS = {
    "recompute": "recompute=full",
    "selective": "recompute=selective",
    "offload": "offload_activations=true",
    "dynamic": "dynamic_context_parallel=true",
    "gather": "megatron.cp_comm_type=all_gather",
    "heads": "megatron.cp_comm_type=a2a",
    "levels": "megatron={cp_comm_type: a2a+p2p, hierarchical_context_parallel_sizes: [2, 2]}",
    "overlap": "megatron={overlap_grad_reduce: true, bucket_size: 20000}",
}
DIMENSIONS = ("TP", "PP", "VPP", "CP", "EP", "ETP", "DP")


@dataclass(frozen=True, slots=True)
class Row:
    """One layout of one model on a number of ranks."""

    ranks: int
    """World size."""
    layout: str
    """`TP2 PP2 first1 last3`; words without a number say how it computes: `recompute` = all layers again, `selective` =
    the experts again (of a dense model the feed-forward part), `offload` = layer inputs in memory of the host,
    `dynamic` = packs of one update are shared by 1, 2 and 4 of the CP ranks (`policy_batch.MIXED`), `gather`, `heads`,
    `levels` = how context-parallel ranks meet keys and values, other than by a ring (for which plain torch gathers),
    `spread` = optimizer states spread over the replicas, `overlap` = gradients reduced during the backward pass."""
    model: str = "moe"
    """A key of MODELS."""
    in_test: bool = False
    """Whether `make test` runs it too; the others run in `make parity` only."""

    @property
    def name(self) -> str:
        """How tables and tests call it."""
        return f"{self.ranks} ranks, {self.layout or 'DP'}, {self.model}"

    @property
    def spread(self) -> bool:
        """Whether it runs with Megatron's distributed optimizer."""
        return SPREAD in self.layout.split()

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Types it can run in; Megatron's distributed optimizer takes no float64."""
        return ("float32",) if self.spread else ("float32", "float64")

    @property
    def overrides(self) -> list[str]:
        """What the row changes in a recipe."""
        words = [re.fullmatch(r"([A-Za-z]+)(\d*)", word) for word in self.layout.split() if word != SPREAD]
        asked = [(word[1], word[2]) for word in words if word]
        trainer = [WORDS[key] if key in WORDS else f"{KEYS[key]}={size}" for key, size in asked]
        return [*architecture_overrides(self.model), *(f"trainer.{value}" for value in trainer)]

    def dimensions(self, recipe: Recipe) -> frozenset[str]:
        """The kinds of parallelism that are really at work."""
        layout = layout_of(recipe.trainer, self.ranks)
        sizes = (
            layout.tensor, layout.pipeline, layout.virtual, layout.context, layout.expert, layout.expert_tensor,
            layout.data,
        )  # fmt: skip
        return frozenset(name for name, size in zip(DIMENSIONS, sizes, strict=True) if size > 1)


ROWS = [
    Row(4, ""),
    Row(4, "TP2"),
    Row(4, "TP4"),
    Row(4, "PP2"),
    Row(4, "PP4"),
    Row(4, "PP2 VPP2"),
    Row(4, "EP2"),
    Row(4, "EP4"),
    Row(4, "CP2"),
    Row(4, "CP4"),
    Row(4, "TP2 EP2"),
    Row(4, "TP2 EP4"),
    Row(4, "TP2 ETP2"),
    Row(4, "TP2 EP2 ETP2", in_test=True),
    Row(4, "TP4 EP2 ETP2"),
    Row(4, "CP2 EP2"),
    Row(4, "CP2 EP4", in_test=True),
    Row(4, "TP2 CP2"),
    Row(4, "TP2 CP2 EP4"),
    Row(4, "TP2 CP2 EP2 ETP2", in_test=True),
    Row(4, "TP2 PP2"),
    Row(4, "TP2 PP2 EP2"),
    Row(4, "TP2 PP2 VPP2 EP2", in_test=True),
    Row(4, "PP2 CP2"),
    Row(4, "PP2 CP2 EP2"),
    Row(4, "PP2 VPP2 CP2 ETP2", in_test=True),
    Row(4, "PP2 VPP2 EP2", in_test=True),
    Row(4, "PP2 first1 last3 EP2", in_test=True),
    Row(4, "PP2 VPP2 first3 last3 EP2", "moe, 6 layers", in_test=True),
    Row(4, "PP2 VPP2 CP2 recompute"),
    Row(4, "TP2 PP2 EP2 recompute"),
    Row(4, "PP2 CP2 EP2 selective"),
    Row(4, "PP2 VPP2 EP2 recompute offload"),
    Row(4, "TP2 EP2 spread", in_test=True),
    Row(4, "TP2 EP2 spread overlap", in_test=True),
    Row(4, "PP2 VPP2 EP2 overlap", "moe"),
    Row(4, "overlap", "dense, tied"),
    Row(4, "PP2 VPP2 EP2 spread"),
    Row(4, "CP2 EP4 spread"),
    Row(4, "TP4 EP2", "moe, 2 KV heads", in_test=True),
    Row(4, "TP2 CP2", "dense"),
    Row(4, "TP2 PP2", "dense, tied", in_test=True),
    Row(4, "PP2 VPP2", "dense, tied"),
    Row(4, "TP2", "qwen2"),
    Row(4, "TP4", "qwen2", in_test=True),
    Row(4, "TP2 PP2", "qwen2, tied", in_test=True),
    Row(4, "PP2 VPP2 CP2", "qwen2"),
    Row(4, "CP2", "llama", in_test=True),
    Row(4, "TP2 CP2", "llama, tied"),
    Row(4, "TP2 PP2", "llama"),
    Row(4, "CP4 dynamic EP2", in_test=True),
    Row(4, "CP4 dynamic EP4 recompute"),
    Row(4, "CP4 dynamic ETP2"),
    Row(4, "CP2 dynamic EP4 spread"),
    Row(4, "TP2 CP2 dynamic EP2", in_test=True),
    Row(4, "PP2 CP2 dynamic EP2"),
    Row(4, "PP2 VPP2 CP2 dynamic EP2", in_test=True),
    Row(4, "TP2 CP2 dynamic", "llama, tied"),
    Row(4, "CP2 EP2 heads"),
    Row(4, "TP2 CP2 EP4 heads", in_test=True),
    Row(4, "CP4 EP2 heads recompute"),
    Row(4, "CP4 EP2 levels", in_test=True),
    Row(4, "CP4 dynamic EP2 heads", in_test=True),
    Row(4, "PP2 VPP2 CP2 heads", "qwen2"),
    Row(8, ""),
    Row(8, "EP8"),
    Row(8, "TP8 EP8"),
    Row(8, "TP2 PP2 CP2 EP2"),
    Row(8, "TP2 PP2 VPP2 EP4"),
    Row(8, "TP2 CP2 EP2 ETP2"),
    Row(8, "TP4 PP2 EP2 ETP2"),
    Row(8, "CP4 PP2 EP4"),
    Row(8, "TP2 PP2 VPP2 CP2 EP2 ETP2"),
    Row(8, "TP2 CP4 EP2 levels"),
    Row(8, "TP2 PP4 first1 last1 EP2", "moe, 6 layers"),
    Row(8, "TP4 PP2 EP4", "moe, 2 KV heads"),
    Row(8, "TP8", "dense"),
]


def missing_pairs(at_work: list[frozenset[str]]) -> list[tuple[str, str]]:
    """Pairs of kinds of parallelism that no row has together."""
    return [pair for pair in itertools.combinations(DIMENSIONS, 2) if not any(set(pair) <= dims for dims in at_work)]
