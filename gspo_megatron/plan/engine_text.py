"""`gspo plan RECIPE --explain-engines`: what differs from the defaults of Megatron and vLLM, why, and the source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.machines import machine_of, takes_turns
from gspo_megatron.config.engine_sections import SIGNATURES
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.megatron_engine import (
    data_parallel_arguments,
    optimizer_arguments,
    transformer_arguments,
)
from gspo_megatron.models.vllm_engine import engine_arguments
from gspo_megatron.plan import engine_defaults, engine_reasons
from gspo_megatron.plan.engine_reasons import Reason
from gspo_megatron.plan.units import value_text


@dataclass(frozen=True, slots=True)
class Row:
    """One argument that differs from the library's default."""

    engine: str
    """`megatron` or `vllm`."""
    owner: str
    """The library's class."""
    name: str
    value: Any
    default: Any
    why: str
    source: str


def explain_engines(recipe: Recipe) -> list[Row]:
    """Every argument of a run that differs from the default of its library.

    Raises:
        KeyError: no reason is given for one; a test holds the shipped recipes against the tables.
    """
    trainer, machine = recipe.trainer, machine_of(recipe)
    gpu, dtype = not machine.is_cpu, recipe.model.dtype
    distributes = trainer.distributed_optimizer and gpu
    megatron = {
        "TransformerConfig": transformer_arguments(recipe.arch, trainer, dtype, gpu),
        "DistributedDataParallelConfig": data_parallel_arguments(trainer, dtype, distributes),
        "OptimizerConfig": optimizer_arguments(recipe.optimizer, dtype, distributes),
    }
    vllm = {"EngineArgs": engine_arguments(recipe, Path("RUN/model"), gpu, takes_turns(recipe))}
    given = {"megatron": trainer.megatron.given(), "vllm": recipe.rollout.vllm.given()}
    return [
        *_differing("megatron", megatron, engine_reasons.MEGATRON, given["megatron"], "trainer.megatron"),
        *_differing("vllm", vllm, engine_reasons.VLLM, given["vllm"], "rollout.vllm"),
    ]


def kept_defaults(recipe: Recipe) -> list[Row]:
    """The arguments that this run leaves at their library's default although others set them; none without a GPU."""
    if machine_of(recipe).is_cpu:
        return []
    trainer = recipe.trainer
    there = {
        "": True, "experts": recipe.arch.num_experts > 0, "context": trainer.context_parallel > 1,
        "tensor": trainer.tensor_parallel > 1, "unrounded": recipe.rollout.weight_dtype is None,
    }  # fmt: skip
    set_here = {(row.engine, row.name) for row in explain_engines(recipe)}
    return [
        Row(engine, owner, name, default, default, f"{kept.why} ({kept.others})", kept.source)
        for engine, table in (("megatron", engine_defaults.MEGATRON), ("vllm", engine_defaults.VLLM))
        for name, kept in table.items()
        for owner, default in [_default(engine, name)]
        if there[kept.needs] and (engine, name) not in set_here
    ]


def print_engines(recipe: Recipe, as_json: bool = False) -> None:
    """Write the rows to standard output."""
    rows, kept = explain_engines(recipe), kept_defaults(recipe)
    if as_json:
        fields = ("engine", "owner", "name", "value", "default", "why", "source")
        print(json.dumps([{name: getattr(row, name) for name in fields} for row in rows + kept], indent=1, default=str))
        return
    width = max(len(row.name) for row in rows)
    owner = ""
    for row in rows:
        if row.owner != owner:
            owner = row.owner
            print(f"{row.engine}: {owner}, what differs from its defaults")
        value, default = value_text(row.value), value_text(row.default)
        print(f"  {row.name:<{width}}  {value} (default {default}): {row.why}. Source: {row.source}")
    if kept:
        print("left at the library's default, although others set it or a guide names it")
    for row in kept:
        print(f"  {row.name:<{width}}  {value_text(row.default)}: {row.why}. Source: {row.source}")


def _default(engine: str, name: str) -> tuple[str, Any]:
    """The class that has an argument, and its default."""
    owner = next(owner for owner, arguments in SIGNATURES[engine].items() if name in arguments)
    return owner, SIGNATURES[engine][owner][name]["default"]


def _differing(
    engine: str, values: dict[str, dict[str, Any]], reasons: Any, given: dict[str, Any], section: str
) -> Iterator[Row]:
    for owner, arguments in values.items():
        known = SIGNATURES[engine][owner]
        for name, value in arguments.items():
            default = known[name]["default"]
            if isinstance(default, str):
                default = default.removeprefix("torch.")
            if value == default and name not in given:
                continue
            reason = Reason("the recipe says so", f"recipe: {section}.{name}") if name in given else reasons[name]
            yield Row(engine, owner, name, value, default, *reason)
