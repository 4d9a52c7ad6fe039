"""The first weights: a Hugging Face directory, or fine-tuning on worked answers with the same trainer."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import gspo_megatron
from gspo_megatron.config.schema import Recipe
from gspo_megatron.config.task_sections import ColdStartSection
from gspo_megatron.data.demonstrations import build_demonstrations
from gspo_megatron.data.own_demonstrations import draw_demonstrations
from gspo_megatron.data.stream import PromptStream
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.policy import LossFunction, OptimizerSettings, Scored
from gspo_megatron.policy.weights import random_pieces, safetensors_pieces
from gspo_megatron.trainer.step import Trainer
from gspo_megatron.types import Finding


def prepare_weights(trainer: Trainer) -> None:
    """Load the starting weights: from `model.path`, from the cold start (made once, then cached), or random ones."""
    recipe, policy = trainer.recipe, trainer.policy
    arch = recipe.arch
    if recipe.cold_start is None:
        source = (
            safetensors_pieces(recipe.model.path, arch) if recipe.model.path else random_pieces(arch, recipe.run.seed)
        )
        policy.load(source)
        return
    cached = recipe.cold_start.cache / cache_key(recipe)
    have = [(cached / "config.json").is_file()]
    dist.broadcast_object_list(have, src=0)
    if not have[0]:
        policy.load(
            safetensors_pieces(recipe.model.path, arch) if recipe.model.path else random_pieces(arch, recipe.run.seed)
        )
        fine_tune(trainer, recipe.cold_start)
        run = hashlib.sha256(str(trainer.log.run_dir.path.absolute()).encode()).hexdigest()[:8]
        own = cached.with_name(f"{cached.name}.{run}")
        policy.save(own, "cold_start.cache")
        if dist.get_rank() == 0:
            publish(own, cached)
        dist.barrier()
    policy.load(safetensors_pieces(cached, arch))
    trainer.log.say(f"cold start: {cached}{' (cached)' if have[0] else ''}")


def publish(own: Path, cached: Path) -> None:
    """Move a run's own weights to the cache. Runs that made them at the same time all use the first one's.

    Raises:
        OSError: the place is taken by something that is no Hugging Face directory.
    """
    try:
        own.rename(cached)  # never over a directory that holds something
    except OSError:
        if not (cached / "config.json").is_file():
            raise
        shutil.rmtree(own)


def check_band(trainer: Trainer, accuracy: float) -> None:
    """Warn when the cold start left the model too weak to be rewarded, or too good to improve."""
    section = trainer.recipe.cold_start
    if section is not None and not section.accuracy_band[0] <= accuracy <= section.accuracy_band[1]:
        low, high = section.accuracy_band
        message = f"held-out accuracy {accuracy:.3f} after fine-tuning is outside {low}..{high}"
        fix = "change cold_start.steps, or accuracy_band if that is meant"
        trainer.log.warn(Finding("cold-start-outside-band", "warning", "cold_start.steps", message, fix))


def cache_key(recipe: Recipe) -> str:
    """Hash of everything that decides the fine-tuned weights."""
    section = recipe.cold_start
    assert section is not None
    parts = {
        "version": gspo_megatron.__version__,
        "seed": recipe.run.seed,
        "model": recipe.model.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json"),
        "cold_start": section.model_dump(mode="json", exclude={"cache", "accuracy_band"}),
        "tokenizer": recipe.tokenizer.model_dump(mode="json"),
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for file in (recipe.tokenizer.path, section.path):
        if file is not None and file.is_file():
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def fine_tune(trainer: Trainer, section: ColdStartSection) -> None:
    """Masked cross entropy on demonstrations, mean over the trained tokens of each step."""
    recipe = trainer.recipe
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.model.path)
    stream, count = PromptStream(recipe, tokenizer), section.steps * section.batch_size
    if section.path is not None:
        samples, warnings = draw_demonstrations(recipe, tokenizer, stream.holds_out, count)
        for warning in warnings:
            trainer.log.warn(warning)
    else:
        problems = stream.training_problems(count, "cold_start")
        samples = build_demonstrations(problems, section, tokenizer, stream.write)
    trainer.policy.start_optimizer(OptimizerSettings(section.lr, section.betas, 1e-8, 0.0, section.clip_grad))
    with trainer.log.time("cold_start"), trainer.log.progress("cold start", section.steps) as bar:
        for step in range(section.steps):
            batch = samples[step * section.batch_size : (step + 1) * section.batch_size]
            tokens = sum(int(sample.loss_mask.sum()) for sample in batch)
            placed = trainer.batcher.place_samples(batch)
            trainer.policy.train(placed, _cross_entropy(tokens), learning_rate(section, step))
            bar.update(step + 1)


def learning_rate(section: ColdStartSection, step: int) -> float:
    """Linear warm-up, constant, then linear to a twentieth over the last `decay_fraction` of the steps."""
    warm = min(1.0, (step + 1) / max(1, section.warmup_steps))
    left = (section.steps - step) / max(1.0, section.decay_fraction * section.steps)
    return section.lr * warm * min(1.0, 0.05 + 0.95 * left)


def _cross_entropy(tokens: int) -> LossFunction:
    def loss(batch: MicroBatch, scored: Scored, _: int) -> tuple[Tensor, dict[str, Tensor]]:
        return -torch.where(batch.loss_mask, scored.logprobs, 0.0).sum() / tokens, {}

    return loss
