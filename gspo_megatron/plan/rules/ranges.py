"""Numbers outside what published runs use: a mistyped exponent, a wrong unit, a value of another algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.config.schema import Recipe
from gspo_megatron.plan.rules.objective import is_read
from gspo_megatron.types import Finding

WIDE = 1024
"""Hidden size from which published learning rates apply. Smaller models are studies, with rates of their own."""
Applies = Literal["always", "wide", "narrow", "gpu", "bfloat16"]

SOLD = "GPUs on the market have"
"""Of the numbers that describe a machine: outside them the unit is wrong."""


@dataclass(frozen=True, slots=True)
class Range:
    """The values of a key that public runs have, bounds included."""

    key: str
    """Dotted recipe key; a number names an element of a list."""
    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    source: str
    """Where the bounds come from."""
    applies: Applies = "always"
    """To which runs: all, models of width WIDE and more or below it, runs on GPUs, runs in bfloat16."""
    off: float | None = None
    """A value that switches the key off, and is in order."""
    of: str = "published runs have"
    """Whose values they are."""


RANGES: tuple[Range, ...] = (
    Range(
        "optimizer.lr", 5e-8, 1e-4, "GSPO and DAPO 1e-6, Kimi and MiniMax 1e-7 to 5e-6, distillation 1e-5", "wide", 0
    ),
    Range("optimizer.lr", 2e-6, 2e-2, "1e-4 to 3e-3 for models of some million parameters", "narrow", 0),
    Range("cold_start.lr", 2e-5, 5e-2, "1e-4 to 3e-3 for models of some million parameters", "narrow"),
    Range("optimizer.betas.0", 0.8, 0.99, "0.9 in every public recipe"),
    Range("optimizer.betas.1", 0.9, 0.9999, "0.95 (Qwen3, DeepSeek) to 0.999 (Adam's default)"),
    Range("optimizer.eps", 1e-20, 1e-5, "1e-8 (Adam), 1e-15 (MiniMax-M1), 1e-5 (LLaMA 2)"),
    Range("optimizer.weight_decay", 0.0, 0.3, "0 to 0.1 in public recipes"),
    Range("optimizer.clip_grad", 0.05, 20.0, "0.1 to 1.0 in public recipes", "wide"),
    Range("cold_start.lr", 5e-7, 2e-4, "fine-tuning of Qwen and Llama: 1e-6 to 2e-5", "wide"),
    Range("cold_start.betas.0", 0.8, 0.99, "0.9 in every public recipe"),
    Range("cold_start.betas.1", 0.9, 0.9999, "0.95 to 0.999 in public recipes"),
    Range("cold_start.clip_grad", 0.05, 20.0, "0.1 to 1.0 in public recipes", "wide"),
    Range("batch.prompts", 1, 8192, "64 to 1,024 in public recipes"),
    Range("batch.answers", 2, 256, "8 to 64 in public recipes"),
    Range("batch.updates", 1, 64, "4 (GSPO) to 16 (DAPO)"),
    Range("objective.kl_coefficient", 1e-5, 0.5, "1e-3 (public GRPO recipes) to 0.2 (InstructGPT)", off=0),
    Range("objective.advantage_eps", 0.0, 1e-2, "1e-8 to 1e-4 in public code"),
    Range("objective.gae_discount", 0.9, 1.0, "0.99 to 1 in public recipes"),
    Range("objective.gae_decay", 0.5, 1.0, "0.95 (PPO) to 1 (VAPO's critic)", off=0),
    Range("objective.value_clip", 0.02, 20.0, "0.2 (PPO) to 0.5; rewards of 0 and 1"),
    Range("objective.value_coefficient", 1e-3, 2.0, "0.1 (TRL) to 1"),
    Range("objective.dual_clip_bound", 1.5, 20.0, "3 (dual-clip PPO) to 10"),
    Range("objective.ratio_cap", 1.0, 20.0, "CISPO: 5 (MiniMax-M1) to 8"),
    Range("objective.tau_positive", 0.1, 10.0, "SAPO: 1.0"),
    Range("objective.tau_negative", 0.1, 10.0, "SAPO: 1.05"),
    Range("objective.tis_cap", 1.0, 20.0, "2 to 10 in public recipes"),
    Range("objective.mask_low", 0.0, 0.99, "0 to 0.5 in public recipes; a weight is 1 where the engines agree"),
    Range("objective.mask_high", 1.01, 20.0, "2 to 5 in public recipes; a weight is 1 where the engines agree"),
    Range("objective.geometric_low", 0.5, 0.99999, "0.99 to 0.999; the mean is 1 where the engines agree"),
    Range("objective.geometric_high", 1.00001, 2.0, "1.001 to 1.01; the mean is 1 where the engines agree"),
    Range("objective.opsm_delta", 1e-6, 1e-2, "1e-4 (slime)"),
    Range("objective.trust_region_delta", 1e-4, 10.0, "nats: 0.5 is a factor of e, 2 one of e^2"),
    Range("objective.veto_below", 1e-8, 1e-2, "1e-4 to 1e-6 in public recipes"),
    Range("trainer.max_steps", 0, 20_000, "500 to 10,000 steps in public runs"),
    Range("trainer.max_skipped", 0, 50, "a few: what is skipped more often is not an outlier"),
    Range("trainer.head_chunk_tokens", 64, 16_384, "1,024 fills a GPU; a chunk holds float32 logits", "gpu"),
    Range("trainer.aux_loss_coefficient", 0.0, 0.01, "1e-3 in pre-training of Qwen3-MoE"),
    Range("rollout.temperature", 0.01, 1.5, "0.6 to 1.2 in public recipes"),
    Range("evaluation.temperature", 0.0, 1.2, "0, 0.6 and 1.0 in public evaluations"),
    Range("evaluation.answers", 1, 1024, "1 to 64; pass@k studies 1,024"),
    Range("rollout.max_prompt_tokens", 64, 131_072, "512 to 8,192; a chat template alone takes some 20", "wide"),
    Range("rollout.max_prompt_tokens", 8, 131_072, "32 for problems of a few digits", "narrow"),
    Range("rollout.start_timeout", 2, 21_600, "seconds: minutes to an hour for the largest models"),
    Range("rollout.max_concurrency", 8, 2048, "256 to 1,024, vLLM's defaults", "gpu"),
    Range("rollout.max_staleness", 0, 8, "1 (one step off) to 8 (AReaL)"),
    Range("rollout.gpu_memory_fraction", 0.3, 0.95, "0.5 to 0.9 in public recipes", "gpu"),
    Range("rollout.stream_interval", 1, 4096, "tokens that a lost server costs each response"),
    Range("weight_update.bucket_mib", 1, 8192, "64 to 2,048 in public systems"),
    Range("weight_update.timeout", 0.5, 21_600, "seconds: an update takes seconds to minutes"),
    Range("weight_update.canary_bound", 0.02, 5.0, "the engines differ by up to 0.3 nats in bfloat16", "bfloat16"),
    Range("weight_update.canary_prompts", 1, 256, "4 probes cost 0.1 s"),
    Range("weight_update.canary_tokens", 2, 4096, "16 tokens show a wrong tensor"),
    Range("placement.walltime_hours", 0.1, 168, "hours: queues of public clusters allow 4 hours to 7 days"),
    Range("placement.host_memory_gib", 32, 8192, "GiB a node: 960 to 2,048 on 8-GPU servers", "gpu"),
    Range("placement.gpus_per_node", 1, 72, "8; 4 on Grace nodes; 72 in an NVL72 domain", "gpu"),
    Range("placement.price", 0.05, 2000, "of a GPU-hour, not of a node or a month: 1 to 12 US dollars", of=SOLD),
    Range("placement.power", 100, 4000, "watts of one GPU with its share, not kW or a node's: 600 to 2,000", of=SOLD),
    Range("placement.device.memory", 8, 1024, "GiB, not MiB: 80 GB are 79", of=SOLD),
    Range("placement.device.flops", 20, 10_000, "TFLOP/s, dense in bfloat16: 312 (A100) to 2,500 (GB200)", of=SOLD),
    Range("placement.device.memory_bandwidth", 100, 40_000, "GB/s, not TB/s: 2,040 (A100) to 8,000 (B200)", of=SOLD),
    Range("placement.device.link", 5, 2000, "GB/s one way: 64 (PCIe 5) to 900 (B200)", of=SOLD),
    Range("placement.device.network", 0.5, 200, "GB/s one way a GPU, not Gb/s: 400 Gb/s are 50", of=SOLD),
    Range("checkpoint.keep", 1, 20, "2 or 3; each is a whole training state"),
    Range("model.architecture.initializer_range", 1e-3, 0.5, "0.006 to 0.02 in published models"),
    Range("model.architecture.rms_norm_eps", 1e-8, 1e-4, "1e-6 (Qwen), 1e-5 (Llama)"),
    Range("model.architecture.rope_theta", 1e3, 1e9, "1e4 (Llama) to 1e7 (Qwen3 2507)"),
)
"""One row a number. Bounds are wider than what was published, so that a study of a key passes."""


def findings(recipe: Recipe, arch: Architecture, machine: Machine, spec: ObjectiveSpec) -> Iterator[Finding]:
    """Warn of each number outside its range. An objective axis that nothing reads is left to `objective-key-inert`."""
    applies: dict[Applies, bool] = {
        "always": True,
        "wide": arch.hidden_size >= WIDE,
        "narrow": arch.hidden_size < WIDE,
        "gpu": not machine.is_cpu,
        "bfloat16": recipe.model.dtype == "bfloat16" and arch.hidden_size >= WIDE,
    }
    for row in RANGES:
        value = _value(recipe, row.key)
        if value is None or value == row.off or not applies[row.applies] or row.low <= value <= row.high:
            continue
        if row.key.startswith("objective.") and not is_read(spec, row.key.removeprefix("objective.")):
            continue
        side = "below" if value < row.low else "above"
        key = row.key.removesuffix(".0").removesuffix(".1")
        yield Finding(
            # A code a key: acknowledging one unusual number says nothing about the others.
            f"unusual-{key.rpartition('.')[2].replace('_', '-')}", "warning", key,
            f"{value:g} is {side} {row.low if side == 'below' else row.high:g}, the "
            f"{'least' if side == 'below' else 'most'} that {row.of} ({row.source})",
            f"use a value from {row.low:g} to {row.high:g}, or acknowledge this warning with a reason",
        )  # fmt: skip


def _value(recipe: Recipe, key: str) -> float | None:
    """Return a number of the recipe; None where it, or its section, is null."""
    found: Any = recipe
    for name in key.split("."):
        if isinstance(found, dict):
            found = found.get(name)
        elif isinstance(found, (list, tuple)):
            found = found[int(name)]
        else:
            found = getattr(found, name)
        if found is None:
            return None
    return found
