"""A recipe's architecture beside what is known of the model that `model.path` names, where its files are not here."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.published import named_size, published_facts
from gspo_megatron.plan.estimate import flops
from gspo_megatron.types import Finding

SIZE_FACTOR = 1.35
"""Names round: Llama-3.2-1B has 1.24 billion parameters, Qwen2.5-7B 7.6."""
OTHER_MODEL = 3
"""Differing facts from which the directory is the mistake, and not the facts."""
ACTIVE_FACTOR = 1.6
"""Active parameters are counted with and without embeddings."""


def findings(recipe: Recipe, arch: Architecture) -> Iterator[Finding]:
    """Compare the architecture with the facts and with the size in the name. A config.json that is here decides."""
    yield from _scaling(recipe, arch)
    path = recipe.model.path
    if path is None or (path / "config.json").is_file():
        return
    facts = published_facts(path.name)
    differing = [name for name, fact in facts.items() if getattr(arch, name, fact) != fact]
    if len(differing) >= OTHER_MODEL:
        yield Finding(
            "not-the-published-model", "warning", "model.path",
            f"model.architecture differs from the published {path.name} in {', '.join(differing)}: it is another model",
            "name the directory of this architecture, or remove model.architecture where the directory is",
        )  # fmt: skip
        return
    for name in differing:
        value, fact = getattr(arch, name), facts[name]
        text = str(bool(fact)).lower() if isinstance(value, bool) else f"{fact:g}"
        yield Finding(
            "not-the-published-model", "warning", f"model.architecture.{name}",
            f"{str(value).lower()}, but {path.name} was published with {text}",
            f"set it to {text}, or name the directory of the model that the recipe describes",
        )  # fmt: skip
    if not differing:
        yield from _size(recipe, arch, path.name)


def _size(recipe: Recipe, arch: Architecture, name: str) -> Iterator[Finding]:
    size = named_size(name)
    if size is None:
        return
    rows: tuple[tuple[float | None, int, float, str], ...] = (
        (size.total, flops.parameters(arch), SIZE_FACTOR, "parameters"),
        (size.active, flops.active_parameters(arch), ACTIVE_FACTOR, "active parameters"),
    )
    for promised, counted, factor, what in rows:
        if promised and not 1 / factor <= counted / (promised * 1e9) <= factor:
            yield Finding(
                "size-differs-from-name", "warning", "model.path",
                f"{name} says {promised:g} billion {what}, model.architecture has {counted / 1e9:.2f}",
                "name the directory of this architecture, or remove model.architecture where the directory is",
            )  # fmt: skip


def _scaling(recipe: Recipe, arch: Architecture) -> Iterator[Finding]:
    """A scaled rotary embedding changes attention at every length: it has to be what the context requires."""
    scaling = arch.rope_scaling or {}
    original = scaling.get("original_max_position_embeddings")
    if scaling.get("rope_type") != "yarn" or original is None:
        return
    longest = recipe.rollout.max_sequence_tokens
    reach, key = float(original) * float(scaling.get("factor", 1)), "model.architecture.rope_scaling"
    facts = published_facts(recipe.model.path.name) if recipe.model.path else {}
    native = max(float(original), facts.get("max_position_embeddings", 0))
    if longest <= native:
        yield Finding(
            "yarn-not-required", "warning", key,
            f"YaRN changes attention at every length, but prompt and response have at most {longest} tokens and the "
            f"model was trained to {native:.0f}",
            "remove it, or acknowledge this warning where the model was tuned with it",
        )  # fmt: skip
    elif arch.max_position_embeddings > reach:
        yield Finding(
            "yarn-below-native", "warning", key,
            f"YaRN from {original} by {scaling.get('factor')} reaches {reach:.0f} tokens, less than "
            f"max_position_embeddings={arch.max_position_embeddings}",
            "remove it from a model that was trained to this length, or set original_max_position_embeddings",
        )  # fmt: skip
