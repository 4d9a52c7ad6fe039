"""The oracle of the policy tests: transformers' model in float64, each sequence run alone.

Its inner float32 casts (norms, softmax) are neutralised, else it is only good to 5e-7. Rotary tables stay float32, as
in Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.hf_table import Piece, hf_shapes
from tests.parallel.keep_double import KeepDouble


def read_whole(read: Any, arch: Architecture) -> dict[str, torch.Tensor]:
    """Every tensor of a reader of pieces, whole."""
    return {
        name: read(Piece(name, (0, shape[0]), (0, shape[1]) if len(shape) > 1 else None, (0, shape[0])))
        for name, shape in hf_shapes(arch).items()
    }


def build_oracle(arch: Architecture, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers' model with these weights, in float64."""
    settings = arch.to_hugging_face("float64")
    for name in ("architectures", "dtype"):
        settings.pop(name)
    config = AutoConfig.for_model(**settings)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    inv_freq = model.model.rotary_emb.inv_freq.clone()
    model = model.to(torch.float64)
    model.model.rotary_emb.inv_freq = inv_freq
    values = stack_experts(arch, {name: t.double() for name, t in tensors.items()})
    if arch.tie_word_embeddings:
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    model.load_state_dict(values)
    return model


def stack_experts(arch: Architecture, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 holds the experts of a layer in two stacked tensors."""
    stacked = dict(tensors)
    for layer in range(arch.num_hidden_layers if arch.num_experts else 0):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = {
            kind: [stacked.pop(f"{prefix}{expert}.{kind}_proj.weight") for expert in range(arch.num_experts)]
            for kind in ("gate", "up", "down")
        }
        both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        stacked[prefix + "gate_up_proj"] = torch.stack(both)
        stacked[prefix + "down_proj"] = torch.stack(parts["down"])
    return stacked


def gradients(arch: Architecture, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under the names of the checkpoint, experts unstacked."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(gradient):
                prefix = f"{name.removesuffix('gate_up_proj')}{expert}."
                found[prefix + "gate_proj.weight"], found[prefix + "up_proj.weight"] = both.chunk(2)
        elif name.endswith("experts.down_proj"):
            for expert, one in enumerate(gradient):
                found[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = one
        else:
            found[name] = gradient
    return found


def token_logprobs(model: torch.nn.Module, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For each sequence [L] the log-probs [L-1] of its tokens after the first."""
    found = []
    with KeepDouble():
        for sequence in sequences:
            logits = model(sequence[None]).logits[0]
            found.append(logits.log_softmax(-1)[:-1].gather(1, sequence[1:, None])[:, 0])
    return found


@contextmanager
def chosen_experts(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within it, every router of the model adds the experts [L, k] that it chooses: layer by layer of each sequence."""
    chosen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, said: chosen.append(said[2])) for layer in model.model.layers
    ]
    yield chosen
    for hook in hooks:
        hook.remove()
