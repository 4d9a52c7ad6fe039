"""How context-parallel ranks meet all keys and values: which kinds a layout takes, and which others there are.

Sources: Transformer Engine 2.20, `dot_product_attention/context_parallel.py` and `utils.py`; megatron-core 0.19.2,
`extensions/transformer_engine.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.trainer_section import TrainerSection
from gspo_megatron.types import Finding

KIND, SIZES = "trainer.megatron.cp_comm_type", "trainer.megatron.hierarchical_context_parallel_sizes"
TWO_LEVELS = "a2a+p2p"


def findings(trainer: TrainerSection, arch: Architecture) -> Iterator[Finding]:
    """Check a kind that exchanges heads beside the layout."""
    given, ranks = trainer.megatron.given(), trainer.context_parallel
    kind, sizes = given.get("cp_comm_type"), given.get("hierarchical_context_parallel_sizes", ())
    if ranks == 1 or kind not in ("a2a", TWO_LEVELS):
        return
    heads = ranks
    if kind == TWO_LEVELS:
        faults = [*_two_levels(trainer, sizes)]
        yield from faults
        if faults:
            return
        heads = sizes[0]
    shared = heads * trainer.tensor_parallel
    if arch.num_key_value_heads % shared:
        of = "TP x CP" if kind == "a2a" else "TP x the first of the sizes"
        yield _error(
            KIND,
            f"{kind} gives each of {shared} ranks ({of}) whole heads, and the model has {arch.num_key_value_heads} of "
            "keys",
            "set it to p2p",
        )


def _two_levels(trainer: TrainerSection, sizes: tuple[int, ...]) -> Iterator[Finding]:
    ranks = trainer.context_parallel
    if len(sizes) != 2 or min(sizes) < 2 or sizes[0] * sizes[1] != ranks:
        yield _error(
            SIZES,
            f"{list(sizes) or 'null'}: {TWO_LEVELS} needs two numbers above 1 that make context_parallel={ranks}",
            f"set it to two such numbers, the ranks of a node first, or {KIND}=p2p",
        )
    elif trainer.dynamic_context_parallel:
        yield _error(
            KIND,
            f"{TWO_LEVELS} keeps the groups of all context-parallel ranks, and with dynamic_context_parallel=true "
            "fewer share a pack",
            "set it to p2p, all_gather or a2a",
        )
    elif trainer.megatron.given().get("flash_attention_version") == 4:
        yield _error(KIND, f"Transformer Engine turns flash-attention 4 off under {TWO_LEVELS}", "set it to p2p")


def _error(key: str, message: str, fix: str) -> Finding:
    return Finding("engine-layout", "error", key, message, fix)


def other_kinds(trainer: TrainerSection, arch: Architecture, machine: Machine) -> Iterator[dict[str, Any]]:
    """Yield, as changes of a recipe, the kinds that a layout takes beside its own, the simplest first.

    Of the sizes of two levels: the most ranks inside a node that exchange heads.
    """
    ranks, tensor = trainer.context_parallel, trainer.tensor_parallel
    within = [size for size in range(2, ranks) if ranks % size == 0 and machine.domain % (tensor * size) == 0]
    heads = [size for size in within if arch.num_key_value_heads % (tensor * size) == 0]
    tried: list[dict[str, Any]] = [{KIND: kind, SIZES: None} for kind in ("p2p", "all_gather", "a2a")]
    tried += [{KIND: TWO_LEVELS, SIZES: (max(heads), ranks // max(heads))}] if heads else []
    for change in tried if ranks > 1 and not machine.is_cpu else ():
        update = {key.rpartition(".")[2]: value for key, value in change.items()}
        other = trainer.model_copy(update={"megatron": trainer.megatron.model_copy(update=update)})
        now = trainer.megatron.given().get("cp_comm_type", "p2p")
        if change[KIND] != now and not any(findings(other, arch)):
            yield change
