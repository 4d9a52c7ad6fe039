"""Rules of settings: keys that contradict each other, or that silently change the algorithm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.config.schema import Recipe
from gspo_megatron.plan.rules import contradictions, data_sheets, engines, known_models, long_tail, ranges
from gspo_megatron.plan.rules.objective import findings as objective_findings
from gspo_megatron.plan.units import value_text
from gspo_megatron.types import Finding

LARGEST_RATE = 0.02
"""Learning rate above which no model has been trained by Adam: weights are of that size."""

NEAR_ONE = 0.2
"""Distance of a temperature from 1 that needs no word. Source: GRPO, DAPO, GSPO and DeepSeek-R1-Zero sample at 1.0."""


def findings(recipe: Recipe, arch: Architecture, machine: Machine) -> Iterator[Finding]:
    """Check everything that requires neither a layout nor an estimate."""
    spec = recipe.objective.spec(recipe.rollout.max_answer_tokens)
    yield from objective_findings(
        spec,
        updates=recipe.batch.updates,
        answers=recipe.batch.answers,
        max_answer_tokens=recipe.rollout.max_answer_tokens,
    )
    yield from ranges.findings(recipe, arch, machine, spec)
    yield from data_sheets.findings(recipe)
    yield from known_models.findings(recipe, arch)
    yield from contradictions.findings(recipe, arch, machine)
    yield from _context(recipe, arch)
    yield from _sampler(recipe)
    yield from _router(recipe, arch)
    yield from _every_sequence(recipe)
    yield from _staleness(recipe, spec)
    yield from long_tail.findings(recipe)
    yield from _replay(recipe, spec, arch, machine)
    yield from _prefix(recipe, spec)
    yield from _rewards(recipe, spec)
    yield from _offload(recipe, machine)
    yield from _small_print(recipe, arch, machine)
    yield from engines.findings(recipe, arch, machine)


def _context(recipe: Recipe, arch: Architecture) -> Iterator[Finding]:
    rollout = recipe.rollout
    longest, native = rollout.max_sequence_tokens, arch.max_position_embeddings
    if longest <= native:
        return
    scaling = arch.rope_scaling or {}
    reach = int(float(scaling.get("factor", 1)) * float(scaling.get("original_max_position_embeddings", native)))
    if longest <= reach:
        return
    what = f"YaRN reaches {reach}" if scaling else f"the model's native context is {native} and there is no YaRN"
    # The larger part is the one that was mistyped.
    key = "max_answer_tokens" if rollout.max_answer_tokens >= rollout.max_prompt_tokens else "max_prompt_tokens"
    yield Finding(
        "beyond-native-context", "error", f"rollout.{key}",
        f"{rollout.max_prompt_tokens} prompt + {rollout.max_answer_tokens} response tokens = {longest}, but {what}",
        f"set model.architecture.rope_scaling (rope_type yarn, factor {-(-longest // native)}.0, "
        f"original_max_position_embeddings {native}), take a model with a longer context, or stay within "
        f"{max(native, reach)}",
    )  # fmt: skip


def _sampler(recipe: Recipe) -> Iterator[Finding]:
    for key, off in (("top_p", 1.0), ("top_k", 0)):
        value = getattr(recipe.rollout, key)
        if value != off:
            yield Finding(
                "sampler-disagrees", "error", f"rollout.{key}",
                f"{value} cuts the sampler's distribution and renormalises it; the trainer's log-probs cover the whole "
                "vocabulary, so every ratio would be off before the first update",
                f"set it to {off:g}",
            )  # fmt: skip
    if recipe.rollout.temperature < 0.3:
        yield Finding(
            "sampler-disagrees", "warning", "rollout.temperature",
            f"{recipe.rollout.temperature:g} sharpens the policy {1 / recipe.rollout.temperature:.0f} times; "
            "differences between the two engines' log-probs grow by the same factor",
            "use 0.6 to 1.0",
        )  # fmt: skip
    elif abs(recipe.rollout.temperature - 1) > NEAR_ONE:
        yield Finding(
            "temperature-off-one", "info", "rollout.temperature",
            f"{recipe.rollout.temperature:g}: the policy is sampled and trained at this temperature; most public "
            "recipes have 1.0, which keeps the variety of a group",
            "nothing to do if it is meant",
        )  # fmt: skip
    if recipe.model.path is not None:
        yield from _generation_config(recipe, recipe.model.path)


def _generation_config(recipe: Recipe, directory: Path) -> Iterator[Finding]:
    file = directory / "generation_config.json"
    if not file.is_file():
        return
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # the reader of the stop ids says so
    if not isinstance(values, dict):
        return
    named = {key: values.get(key) for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    settings = ", ".join(f"{key} {value}" for key, value in named.items() if value is not None)
    if settings:
        yield Finding(
            "sampler-disagrees", "info", "model.path",
            f"generation_config.json has {settings}; the servers ignore it and sample at temperature "
            f"{recipe.rollout.temperature:g} from the whole vocabulary", "nothing to do",
        )  # fmt: skip


def _router(recipe: Recipe, arch: Architecture) -> Iterator[Finding]:
    coefficient = recipe.trainer.aux_loss_coefficient
    if not coefficient:
        return
    if not arch.num_experts:
        yield Finding(
            "aux-loss-inert", "error", "trainer.aux_loss_coefficient",
            f"{coefficient:g} balances experts, but the model has no experts",
            "remove it",
        )  # fmt: skip
        return
    yield Finding(
        "aux-loss-on", "warning", "trainer.aux_loss_coefficient",
        f"{coefficient:g}: the router's balancing loss is added to the objective; in reinforcement learning it "
        "raised the gradient norm 3 to 10 times and lowered accuracy",
        "set it to 0; the load of the experts is logged without it",
    )  # fmt: skip


def _every_sequence(recipe: Recipe) -> Iterator[Finding]:
    if not recipe.trainer.skip_zero_gradients:
        return
    reason = recipe.requires_every_sequence
    if reason:
        yield Finding(
            "zero-gradients-kept", "info", "trainer.skip_zero_gradients",
            f"has no effect: {reason}, so sequences with advantage 0 are scored and trained on like the others",
            "nothing to do",
        )  # fmt: skip
    elif not recipe.skips_clipped:
        yield Finding(
            "clipped-sequences-kept", "info", "trainer.skip_zero_gradients",
            f"leaves out sequences with advantage 0 only: {recipe.keeps_every_gradient}",
            "nothing to do",
        )  # fmt: skip


def _staleness(recipe: Recipe, spec: ObjectiveSpec) -> Iterator[Finding]:
    allowed, extra = recipe.rollout.max_staleness, recipe.rollout.over_provision
    if not allowed:
        if extra:
            yield Finding(
                "cuts-long-answers", "warning", "rollout.over_provision",
                f"{extra:g} extra batches are in flight and aborted when a batch is complete: tokens are lost, and "
                "long responses are trained on less often than they are sampled",
                "set rollout.max_staleness=1 to continue them in the next batch, or over_provision=null",
            )  # fmt: skip
        return
    if extra is not None and not 0 < extra <= allowed:
        yield Finding(
            "over-provision-inert", "warning", "rollout.over_provision",
            f"{extra:g} with max_staleness={allowed}: "
            + ("no response can be stale" if not extra else f"no more than {allowed} batches can be used"),
            f"set it above 0 and up to {allowed}, or to null",
        )  # fmt: skip
    if spec.ratio_reference == "recomputed" and not spec.correction:
        yield Finding(
            "stale-without-correction", "warning", "rollout.max_staleness",
            f"tokens up to {allowed} versions old are trained on as if the current weights had sampled them",
            "set objective.correction to tis or icepop, or max_staleness=0",
        )  # fmt: skip


def _prefix(recipe: Recipe, spec: ObjectiveSpec) -> Iterator[Finding]:
    if spec.ratio_prefix != "none" and recipe.trainer.context_parallel > 1:
        yield Finding(
            "prefix-over-ranks", "error", "trainer.context_parallel",
            f"{recipe.trainer.context_parallel} ranks hold parts of a response, and objective.ratio_prefix="
            f"{spec.ratio_prefix} is a minimum over all tokens before a token, which does not cross ranks",
            "set it to 1, or objective.ratio_prefix=none",
        )  # fmt: skip


def _rewards(recipe: Recipe, spec: ObjectiveSpec) -> Iterator[Finding]:
    low, high = recipe.reward.bounds
    if spec.advantage == "maxrl" and low < 0:
        message = f"[{low:g}, {high:g}] lets a reward be below 0, and objective.advantage=maxrl divides by their mean"
        yield Finding("rewards-below-zero", "error", "reward.bounds", message, f"set it to [0, {high:g}]")


def _replay(recipe: Recipe, spec: ObjectiveSpec, arch: Architecture, machine: Machine) -> Iterator[Finding]:
    if spec.replay == "off":
        return
    if not arch.num_experts:
        yield Finding(
            "replay-needs", "error", "objective.replay",
            f"{spec.replay} replays the choice of experts, but the model has no experts",
            "set objective.replay=off",
        )  # fmt: skip
    if spec.replay != "sampler":
        return
    rollout = recipe.rollout
    for key, value, wanted in (
        # Its first model runner records none on a GPU. Without a GPU it is the only one, and we record there.
        ("model_runner", "v2" if machine.is_cpu else rollout.model_runner or "v2", "v2"),
        ("prefix_caching", rollout.prefix_caching, True),
        ("pipeline_parallel", rollout.pipeline_parallel, 1),
        ("decode_context_parallel", rollout.decode_context_parallel, 1),
    ):
        if value != wanted:
            yield Finding(
                "replay-needs", "error", f"rollout.{key}",
                f"{value_text(value)} with objective.replay=sampler: vLLM then returns no routes",
                f"set it to {value_text(wanted)}, or use objective.replay=trainer",
            )  # fmt: skip


def _offload(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    trainer, key = recipe.trainer, "trainer.offload_activations"
    if not trainer.offload_activations:
        return
    if machine.is_cpu:
        yield Finding(
            "offload-needs", "error", key, "true, but there is no GPU: activations are in host memory already",
            f"set {key}=false",
        )  # fmt: skip
    if trainer.recompute != "full":
        yield Finding(
            "offload-needs", "error", key,
            f"true with trainer.recompute={trainer.recompute}: only the layer inputs of full recomputation are moved",
            f"set trainer.recompute=full, or {key}=false",
        )  # fmt: skip


def _small_print(recipe: Recipe, arch: Architecture, machine: Machine) -> Iterator[Finding]:
    """Check keys that another key makes ineffective."""
    rollout = recipe.rollout
    if rollout.expected_answer_tokens and rollout.expected_answer_tokens > rollout.max_answer_tokens:
        yield Finding(
            "expected-above-limit", "error", "rollout.expected_answer_tokens",
            f"{rollout.expected_answer_tokens} is above max_answer_tokens={rollout.max_answer_tokens}",
            "set it to the mean length, which is below the limit",
        )  # fmt: skip
    if recipe.model.dtype == "float32" and not machine.is_cpu and arch.hidden_size >= 1024:
        yield Finding(
            "float32-on-gpu", "warning", "model.dtype",
            "float32 doubles weights and KV and leaves the tensor cores idle",
            "set it to bfloat16; log-probs and the router stay float32",
        )  # fmt: skip
    yield from _learning_rate(recipe)
    if recipe.evaluation.answers > 1 and recipe.evaluation.temperature == 0:
        yield Finding(
            "evaluation-repeats", "warning", "evaluation.answers",
            f"{recipe.evaluation.answers} greedy responses to a problem are all the same",
            "set evaluation.temperature, e.g. 0.6, or evaluation.answers=1",
        )  # fmt: skip
    if recipe.optimizer.lr > LARGEST_RATE:
        message = f"{recipe.optimizer.lr:g} is more than {LARGEST_RATE}: Adam moves each weight by about lr an update"
        fix = "write 1e-6 for a large model, 1e-3 for a tiny one"
        yield Finding("rate-too-large", "warning", "optimizer.lr", message, fix)
    if recipe.optimizer.lr == 0:
        yield Finding("updates-off", "info", "optimizer.lr", "0 switches the updates off", "leave it for a control run")


def _learning_rate(recipe: Recipe) -> Iterator[Finding]:
    optimizer, total = recipe.optimizer, recipe.total_updates
    if optimizer.schedule == "constant" and optimizer.final_fraction:
        yield Finding(
            "final-fraction-inert", "warning", "optimizer.final_fraction",
            f"{optimizer.final_fraction:g} has no effect with schedule=constant",
            "set optimizer.schedule=cosine or linear, or remove it",
        )  # fmt: skip
    if optimizer.warmup_updates > total > 0:
        yield Finding(
            "warmup-beyond-run", "warning", "optimizer.warmup_updates",
            f"{optimizer.warmup_updates} updates of warm-up in a run of {total}",
            "shorten it, or raise trainer.max_steps",
        )  # fmt: skip
