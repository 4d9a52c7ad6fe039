"""Facts of published models, by the name of their directory: what a recipe says about one of them can be checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Facts = Mapping[str, float]
"""Key of `config.json` -> value."""

_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
_QWEN25 = {"vocab_size": 151936, "rope_theta": 1e6}
_QWEN25_LARGE = {**_QWEN25, "vocab_size": 152064}
_LLAMA3 = {"vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": 131072}
_MOE = {
    **_QWEN3, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": 1, "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}  # fmt: skip


def _shape(hidden: int, layers: int, heads: int, groups: int, width: int, tied: bool = False) -> dict[str, float]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": width,
        "tie_word_embeddings": tied,
    }


_30B = {**_MOE, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "moe_intermediate_size": 768}
_235B = {**_MOE, "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "moe_intermediate_size": 1536}

# The first pattern that is found in a directory's name counts: longer names come first.
_TABLE: tuple[tuple[str, Facts], ...] = (
    (r"Qwen3-30B-A3B-(Thinking|Instruct)-2507", {**_30B, "rope_theta": 1e7, "max_position_embeddings": 262144}),
    (r"Qwen3-Coder-30B-A3B", {**_30B, "rope_theta": 1e7, "max_position_embeddings": 262144}),
    (r"Qwen3-30B-A3B-Base", {**_30B, "max_position_embeddings": 32768}),
    (r"Qwen3-30B-A3B", {**_30B, "max_position_embeddings": 40960}),
    (r"Qwen3-235B-A22B-(Thinking|Instruct)-2507", {**_235B, "rope_theta": 5e6, "max_position_embeddings": 262144}),
    (r"Qwen3-235B-A22B", {**_235B, "max_position_embeddings": 40960}),
    (r"Qwen3-0\.6B", {**_QWEN3, **_shape(1024, 28, 16, 8, 3072, tied=True)}),
    (r"Qwen3-1\.7B", {**_QWEN3, **_shape(2048, 28, 16, 8, 6144, tied=True)}),
    (r"Qwen3-4B-(Thinking|Instruct)-2507", {**_QWEN3, **_shape(2560, 36, 32, 8, 9728, tied=True), "rope_theta": 5e6}),
    (r"Qwen3-4B", {**_QWEN3, **_shape(2560, 36, 32, 8, 9728, tied=True)}),
    (r"Qwen3-8B", {**_QWEN3, **_shape(4096, 36, 32, 8, 12288)}),
    (r"Qwen3-14B", {**_QWEN3, **_shape(5120, 40, 40, 8, 17408)}),
    (r"Qwen3-32B", {**_QWEN3, **_shape(5120, 64, 64, 8, 25600)}),
    (r"Qwen2\.5-Math-1\.5B", {**_QWEN25, **_shape(1536, 28, 12, 2, 8960, tied=True), "rope_theta": 1e4}),
    (r"Qwen2\.5-Math-7B", {**_QWEN25_LARGE, **_shape(3584, 28, 28, 4, 18944), "rope_theta": 1e4}),
    (r"Qwen2\.5-0\.5B", {**_QWEN25, **_shape(896, 24, 14, 2, 4864, tied=True)}),
    (r"Qwen2\.5-1\.5B", {**_QWEN25, **_shape(1536, 28, 12, 2, 8960, tied=True)}),
    (r"Qwen2\.5-3B", {**_QWEN25, **_shape(2048, 36, 16, 2, 11008, tied=True)}),
    (r"Qwen2\.5-7B", {**_QWEN25_LARGE, **_shape(3584, 28, 28, 4, 18944)}),
    (r"Qwen2\.5-14B", {**_QWEN25_LARGE, **_shape(5120, 48, 40, 8, 13824)}),
    (r"Qwen2\.5-32B", {**_QWEN25_LARGE, **_shape(5120, 64, 40, 8, 27648)}),
    (r"Qwen2\.5-72B", {**_QWEN25_LARGE, **_shape(8192, 80, 64, 8, 29568)}),
    (r"Llama-3\.1-8B", {**_LLAMA3, **_shape(4096, 32, 32, 8, 14336)}),
    (r"Llama-3\.1-70B", {**_LLAMA3, **_shape(8192, 80, 64, 8, 28672)}),
    (r"Llama-3\.2-1B", {**_LLAMA3, **_shape(2048, 16, 32, 8, 8192, tied=True)}),
    (r"Llama-3\.2-3B", {**_LLAMA3, **_shape(3072, 28, 24, 8, 8192, tied=True)}),
)
"""Pattern -> facts, from the models' `config.json` files."""


@dataclass(frozen=True, slots=True)
class NamedSize:
    """Parameters that a directory's name promises, in billions."""

    total: float
    """`30` of `Qwen3-30B-A3B`."""
    active: float | None
    """`3` of `Qwen3-30B-A3B`; None where the name does not say."""


def published_facts(directory: str) -> Facts:
    """Return what is known of a model by its directory's name; nothing for an unknown one.

    A name with `Distill` or `tiny` in it is another model under a known name.
    """
    if re.search(r"distill|tiny|random|debug|pruned|\bmini\b", directory, re.IGNORECASE):
        return {}
    return next((facts for pattern, facts in _TABLE if re.search(pattern, directory, re.IGNORECASE)), {})


def named_size(directory: str) -> NamedSize | None:
    """Read the size out of a directory's name: `Qwen3-30B-A3B` has 30 billion parameters, 3 of them active."""
    number = r"(\d+(?:\.\d+)?)"
    total = re.search(rf"(?<![A-Za-z0-9.]){number}B(?![A-Za-z0-9])", directory, re.IGNORECASE)
    if total is None:
        return None
    active = re.search(rf"(?<![A-Za-z0-9])A{number}B(?![A-Za-z0-9])", directory, re.IGNORECASE)
    return NamedSize(float(total.group(1)), float(active.group(1)) if active else None)
