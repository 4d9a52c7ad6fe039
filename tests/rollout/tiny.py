"""A tiny Qwen3-MoE with random weights: Hugging Face's model as the oracle, its checkpoint as what is sent."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models import parse_recipe
from gspo_megatron.types import Problem, Prompt

KEY = "key-of-the-rollout-tests"
VOCAB = 96
STOP = 1
NUM_LAYERS = 4


def make_recipe() -> Recipe:
    """8 prompts, 4 answers each, of at most 20 tokens."""
    return parse_recipe(
        {
            "run": {"seed": 7},
            "model": {
                "dtype": "float32",
                "architecture": {
                    "vocab_size": VOCAB,
                    "hidden_size": 64,
                    "num_hidden_layers": NUM_LAYERS,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 32,
                    "intermediate_size": 128,
                    "moe_intermediate_size": 64,
                    "num_experts": 8,
                    "num_experts_per_tok": 2,
                    "norm_topk_prob": True,
                    "rope_theta": 1e4,
                    "max_position_embeddings": 128,
                },
            },
            "data": {"path": "unused.jsonl"},
            "batch": {"prompts": 8, "answers": 4, "updates": 4},
            "rollout": {
                "max_prompt_tokens": 44,
                "max_answer_tokens": 20,
                "max_concurrency": 64,
                "kv_cache_gib": 0.0625,
                "start_timeout": 600,
                "stream_interval": 3,
            },
            # 1 MiB cuts the checkpoint into several buckets.
            "weight_update": {"bucket_mib": 1, "canary_bound": 1e-4, "timeout": 600},
        }
    )


ARCH = make_recipe().arch


def write_config(directory: Path, arch: Architecture = ARCH) -> None:
    """config.json of a model, in Hugging Face's own words."""
    _config(arch).save_pretrained(directory)


def _config(arch: Architecture) -> Qwen3MoeConfig:
    values = arch.model_dump(exclude={"model_type", "rope_theta", "rope_scaling"})
    return Qwen3MoeConfig(
        **values,
        architectures=["Qwen3MoeForCausalLM"],
        rope_parameters={"rope_type": "default", "rope_theta": arch.rope_theta},
        mlp_only_layers=[],
    )


class Oracle:
    """The Hugging Face model of one seed, with its experts computed one by one."""

    def __init__(self, seed: int, arch: Architecture = ARCH) -> None:
        torch.manual_seed(seed)
        config = _config(arch)
        config._experts_implementation = "eager"
        self.model = Qwen3MoeForCausalLM(config).float().eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.06)
        with tempfile.TemporaryDirectory() as directory:
            self.model.save_pretrained(directory)
            self.tensors = load_file(os.path.join(directory, "model.safetensors"))

    @torch.no_grad()
    def logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """Log-probs of token_ids[1:], [length - 1]."""
        logits = self.model(torch.tensor([list(token_ids)])).logits[0]
        wanted = torch.tensor(list(token_ids[1:]))[:, None]
        return logits.log_softmax(-1)[:-1].gather(1, wanted)[:, 0].numpy()

    @torch.no_grad()
    def routes(self, token_ids: Sequence[int]) -> np.ndarray:
        """The experts that each token chooses, in the order of their numbers, [length, layers, k]."""
        logits = self.model(torch.tensor([list(token_ids)]), output_router_logits=True).router_logits
        chosen = [layer.topk(ARCH.num_experts_per_tok, dim=1).indices.sort(dim=1).values for layer in logits]
        return torch.stack(chosen, dim=1).numpy()

    def probes(self) -> list[tuple[list[int], list[float]]]:
        """Four fixed sequences with this model's log-probs."""
        rows = np.random.default_rng(0).integers(4, VOCAB, size=(4, 16)).tolist()
        return [(row, self.logprobs(row).tolist()) for row in rows]


class CountingPrompts:
    """A prompt stream in memory."""

    def __init__(self) -> None:
        self.index = 0
        self.skipped: Counter[str] = Counter()

    def next(self, count: int) -> list[Prompt]:
        self.index += count
        return [_prompt(index) for index in range(self.index - count, self.index)]

    def held_out(self, count: int | None) -> list[Prompt]:
        return [_prompt(-1 - index) for index in range(5 if count is None else count)]

    def state(self) -> dict[str, Any]:
        return {"index": self.index, "position": self.index, "skipped": {}, "fingerprint": "counting"}

    def restore(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


def _prompt(index: int) -> Prompt:
    length = 5 + abs(index) % 7
    ids = np.random.default_rng(1000 + index).integers(4, VOCAB, size=length).tolist()
    return Prompt(index, Problem(str(index), f"question {index}", {"length": length}), tuple(ids))


class NumberTokenizer:
    """Ids as decimal text."""

    stop_ids = (STOP,)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))
