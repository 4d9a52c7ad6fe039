"""What every layout must equal: transformers in float64, each sequence alone, and GSPO by its definition."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models import load_recipe
from gspo_megatron.policy import weights
from tests import reference
from tests.parallel.hf_model import build_oracle, gradients, read_whole, token_logprobs
from tests.parallel.layouts import architecture_overrides
from tests.parallel.policy_batch import (
    CLIP_HIGH,
    CLIP_LOW,
    SEED,
    SEQUENCES,
    make_advantages,
    make_samples,
    old_logprobs,
)

ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
"""The Adam step that is compared. Megatron decays no vectors."""
SHARD_BYTES = 150_000
"""Makes several files of these small models."""


def file_stem(model: str) -> str:
    """File name of a model of MODELS."""
    return model.replace(",", "").replace(" ", "_")


def architecture(model: str) -> Architecture:
    """The architecture of a model of MODELS."""
    return load_recipe(Path("recipes/tiny_moe.yaml"), architecture_overrides(model)).arch


def write_oracle(model: str, directory: Path) -> None:
    """STEM.pt: loss, gradients, stepped weights; STEM/: the starting weights as a sharded Hugging Face directory."""
    arch = architecture(model)
    start = read_whole(weights.random_pieces(arch, SEED), arch)
    hf = build_oracle(arch, start)
    loss, scale, old = gspo_loss(hf, arch)
    loss.backward()
    found = gradients(arch, hf)
    norm = float(torch.stack([grad.norm() for grad in found.values()]).norm())
    size = float(torch.stack([tensor.double().norm() for tensor in start.values()]).norm())
    lr = size / norm  # the step is as long as the weights
    values = {
        "loss": loss.item(),
        "scale": scale,
        "old": old,
        "norm": norm,
        "gradients": found,
        "start": start,
        "sgd_lr": lr,
        "sgd": {name: start[name].double() - lr * grad for name, grad in found.items()},
        "adam": {name: adam_step(start[name].double(), grad) for name, grad in found.items()},
    }
    torch.save(values, directory / f"{file_stem(model)}.pt")
    write_hf(arch, start, directory / file_stem(model))


def write_hf(arch: Architecture, tensors: dict[str, Tensor], directory: Path) -> None:
    """A Hugging Face directory in several files."""
    whole, weights.SHARD_BYTES = weights.SHARD_BYTES, SHARD_BYTES
    weights.save_hf(iter(tensors.items()), arch.to_hugging_face("float32"), directory)
    weights.SHARD_BYTES = whole


def gspo_loss(hf: torch.nn.Module, arch: Architecture) -> tuple[Tensor, float, list[Tensor]]:
    """The loss, mean |s A| and the old log-probs of each sequence's trained tokens, which are given to every layout."""
    samples = make_samples(arch.vocab_size)
    logprobs = token_logprobs(hf, [torch.as_tensor(sample.token_ids).long() for sample in samples])
    answers = []
    rows = zip(SEQUENCES, make_advantages(arch.vocab_size), logprobs, strict=True)
    for index, ((length, trained), value, logp) in enumerate(rows):
        now = logp[length - 1 - trained :]
        advantage = torch.full((trained,), value, dtype=torch.float64)
        answers.append(reference.Response(now, now.detach() - old_logprobs(trained, index), advantage))
    counted = [answer for answer in answers if answer.length]
    scale = sum(abs(float(reference.sequence_ratio(a).detach() * a.advantage[0])) for a in counted) / len(counted)
    return -reference.gspo(answers, CLIP_LOW, CLIP_HIGH), scale, [answer.old for answer in answers]


def adam_step(weight: Tensor, gradient: Tensor) -> Tensor:
    """The first step: bias-corrected averages are the gradient itself."""
    decay = ADAM["weight_decay"] if weight.dim() > 1 else 0.0
    return weight * (1 - ADAM["lr"] * decay) - ADAM["lr"] * gradient / (gradient.abs() + ADAM["eps"])
