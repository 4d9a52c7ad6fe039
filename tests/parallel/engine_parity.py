"""Transformer Engine's layers beside Hugging Face in float64, without a GPU: a step of `make cuda-dry`.

    python -m tests.parallel.engine_parity [--only TEXT]        one line of JSON; exit 1 when a bound is broken

Rows and bounds are those of `layouts.py` and `parity.py`; `engine_answers.py` says what is not Transformer Engine's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.parallel.engine_answers import SETTINGS
from tests.parallel.layouts import Row
from tests.parallel.oracle import file_stem, write_oracle
from tests.parallel.parity import broken_bounds, worst
from tests.parallel.world import run_world

ROWS = [
    Row(2, "TP2"),
    Row(2, "EP2"),
    Row(2, "PP2"),
    Row(2, "TP2 ETP2"),
    Row(2, "CP2"),
    Row(2, "EP2 recompute"),
    Row(2, "CP2 selective"),
    Row(2, "spread"),
    Row(2, "TP2", "dense, tied"),
    Row(2, "TP2", "qwen2"),
    Row(2, "CP2", "llama"),
    Row(4, "TP2 EP2 spread"),
    Row(4, "PP2 VPP2 CP2"),
    Row(4, "CP4"),
    Row(4, "TP2 CP2 EP2"),
    Row(4, "TP2 PP2 EP2 recompute"),
    Row(4, "TP2 CP2", "llama, tied"),
    Row(2, "CP2 gather"),
    Row(2, "CP2 heads"),
    Row(4, "CP4 gather recompute"),
    Row(4, "TP2 CP2 EP2 heads"),
    Row(4, "CP4 levels"),
]
NO_TRITON = "trainer.megatron.moe_permute_fusion=false"
"""Interpreted, the kernels that reorder tokens take minutes a case; `engine_narrow.py` holds them to megatron's own."""
LIMIT = 3000
NEEDED = ("generic_gemm", "rmsnorm_fwd", "rmsnorm_bwd")


def case_of(row: Row) -> dict[str, Any]:
    """What `engine_worker.py` reads."""
    overrides = [*row.overrides]
    if not row.spread:
        overrides.append("trainer.distributed_optimizer=false")
    if row.model == "moe":
        overrides.append(NO_TRITON)
    return {
        "name": row.name,
        "overrides": overrides,
        "model": file_stem(row.model),
        "spread": row.spread,
        "forms": {"float32": ["packed"]},
        "fault": None,
    }


def faults_of(row: Row, result: dict[str, Any]) -> list[str]:
    """What of a result does not hold; a run that did not go through Transformer Engine proves nothing."""
    needed = [*NEEDED, *(["te_general_grouped_gemm"] if row.model.startswith("moe") else [])]
    words = row.layout.split()
    if "CP" in row.layout:
        needed += ["fused_attn_fwd", "fused_attn_bwd"]
        needed += ["thd_cp_rank_order_to_sequence_order"] if {"gather", "heads", "levels"} & {*words} else []
        needed += ["thd_copy_valid_tokens_from_per_split_to_rank_local"] if "gather" in words else []
        needed += [] if {"gather", "heads"} & {*words} else ["thd_grad_correction"]
    unasked = [f"{name} was not asked" for name in needed if not result["asked"].get(name)]
    return [*broken_bounds(result), *unasked]


def main() -> int:
    """Run, print, exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows with this text in their name")
    chosen = parser.parse_args()
    os.environ |= SETTINGS
    rows = [row for row in ROWS if chosen.only in row.name]
    found: dict[str, Any] = {}
    for ranks in sorted({row.ranks for row in rows}):
        alike = [row for row in rows if row.ranks == ranks]
        with tempfile.TemporaryDirectory() as place:
            for model in {row.model for row in alike}:
                write_oracle(model, Path(place))
            run_world("engine_worker.py", ranks, [case_of(row) for row in alike], Path(place), LIMIT)
            results = json.loads((Path(place) / "results.json").read_text())
        for row, result in zip(alike, results, strict=True):
            figures = {figure: worst(result, figure) for figure in ("loss", "gradient", "sgd")}
            found[row.name] = figures | {
                "adam": result["adam"]["worst"],
                "seconds": round(result["seconds"]),
                "asked": len(result["asked"]),
                "wrong": faults_of(row, result),
            }
            print(f"{row.name}: {found[row.name]}", file=sys.stderr, flush=True)
    print(json.dumps(found), flush=True)
    return int(any(one["wrong"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
