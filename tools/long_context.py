"""Run responses of 100K tokens through the whole system, with and without YaRN: `python tools/long_context.py`.

Each of the two cases is a `gspo train` of tools/long_context.yaml. A weight update fills a real vLLM server, the server
samples two responses to their limit and records the experts of every token, four context-parallel trainer ranks score
and train on them with these experts, and a second weight update follows. Of 400,000 choices some are closer than the
rounding of either engine: without the record such a token differs by tenths of a nat. Memory is the peak resident size
of each process (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.config import Recipe
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.metric_rows import read_rows
from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import Piece, hf_shapes
from gspo_megatron.policy.weights import random_pieces, save_hf

RECIPE = Path(__file__).with_suffix(".yaml")
RESULT = Path(__file__).parent / "results" / "long_context.json"
YARN = "{rope_type: yarn, factor: 4.0, original_max_position_embeddings: 32768}"
ROPES = {"native": [], "yarn": [f"model.architecture.rope_scaling={YARN}"]}
LARGEST, MEAN = 1.5e-4, 1e-6
"""Bounds of |sampler - trainer| of a token and of its signed mean, nats; the clip band is 3e-4."""
SHARPNESS = 2.0
"""Standard deviation of the attention scores. A query attends to exp(-4) of its keys, so every position matters."""
ROLES = {
    "server": "gspo_megatron.inference.server",
    "controller": "gspo_megatron.controller.main",
    "trainer": "gspo_megatron.trainer.loop",
}
"""A part of the command line of each role."""
KEPT = {
    "answer_length": "answer_tokens",
    "rollout_tokens": "rollout_tokens",
    "mismatch_abs_max": "mismatch_abs_max",
    "mismatch_k1": "mismatch_k1",
    "mismatch_k3": "mismatch_k3",
    "mismatch_sampled/free_largest": "largest_without_routes",
    "mismatch_sampled/free_mean": "mean_without_routes",
    "experts/sampler_disagreement": "sampler_disagreement",
    "experts/route_bytes": "route_bytes",
    "experts/route_seconds": "route_seconds",
    "log_s_abs_max/minibatch_0": "log_s_abs_max",
    "canary_largest": "canary_largest",
    "grad_norm": "grad_norm",
    "skipped_updates": "skipped_updates",
    "seconds/rollout": "rollout_seconds",
    "seconds/old_logprobs": "old_logprobs_seconds",
    "seconds/train": "train_seconds",
}
"""Metrics of the step that make the table."""


def write_weights(recipe: Recipe, directory: Path) -> None:
    """Random weights, but for one place of every state, which no layer writes or reads.

    It is 1, and the head makes the stop token's logit of it, far down: sampled answers go on to their limit.
    """
    arch = recipe.arch
    factor = float((arch.rope_scaling or {}).get("factor", 1))
    attention_factor = 1.0 + 0.1 * math.log(factor)  # YaRN's, on queries and keys alike
    read = random_pieces(arch, recipe.run.seed)
    tensors = {
        name: read(Piece(name, (0, rows), (0, columns[0]) if columns else None, (0, rows)))
        for name, (rows, *columns) in hf_shapes(arch).items()
    }
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "layernorm.weight")):
            tensor[0] = 0.0
        elif name.endswith("q_norm.weight"):
            tensor *= SHARPNESS / attention_factor**2
    tensors["model.embed_tokens.weight"][:, 0] = 1.0
    head = tensors["lm_head.weight"]
    head[:, 0] = 0.0
    head[list(load_tokenizer(recipe.tokenizer, None).stop_ids), 0] = -100.0
    save_hf(iter(tensors.items()), arch.to_hugging_face(recipe.model.dtype), directory)


def run(rope: str, overrides: Sequence[str], directory: Path) -> dict[str, Any]:
    """One run; its row of the table."""
    settings = [*ROPES[rope], *overrides]
    write_weights(load_recipe(RECIPE, settings), directory / "weights")
    settings += [f"model.path={directory / 'weights'}", f"run.directory={directory / 'run'}"]
    job = subprocess.Popen([sys.executable, "-m", "gspo_megatron.cli", "train", str(RECIPE), *settings])
    peaks: dict[int, tuple[str, int]] = {}
    before: dict[int, tuple[str, int]] = {}
    began = time.monotonic()
    while job.poll() is None:
        now = memory_of(directory)
        # A process of one sample only is on its way to become another program.
        peaks |= {pid: figures for pid, figures in now.items() if pid in before}
        before = now
        time.sleep(2.0)
    if job.returncode:
        raise SystemExit(f"the run with {rope} rotary embedding ended with code {job.returncode}")
    (row,) = read_rows(directory / "run")
    # Without replay there is nothing of the sampler's routes.
    found = {name: row[metric] for metric, name in KEPT.items() if metric in row}
    memory = {role: mebibytes(peaks, command) for role, command in ROLES.items()}
    return {"rope": rope, **found, "peak_mib": memory, "wall_seconds": round(time.monotonic() - began)}


def memory_of(directory: Path) -> dict[int, tuple[str, int]]:
    """Of the living processes of a run, by pid: command line of their group's leader, and most KiB so far.

    A program that a role calls for a moment, as a shell or a compiler, is not a process of the role.
    """
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            leader = Path("/proc", str(os.getpgid(int(entry.name))))
            command = (leader / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if (entry / "exe").readlink() != (leader / "exe").readlink():
                continue
            status = (entry / "status").read_text()
        except OSError:  # it ended meanwhile
            continue
        if str(directory) in command and "VmHWM:" in status:
            found[int(entry.name)] = (command, int(status.partition("VmHWM:")[2].split()[0]))
    return found


def mebibytes(peaks: dict[int, tuple[str, int]], role: str) -> list[int]:
    """Most memory of each process of a role, largest first; a server is several."""
    return sorted((kib // 1024 for command, kib in peaks.values() if role in command), reverse=True)


def faults(row: dict[str, Any], tokens: int) -> list[str]:
    """What a row does not keep of what is promised."""
    promises = {
        f"every answer has {tokens} tokens": row["answer_tokens"] == tokens,
        f"no token differs by {LARGEST:g} or more": row["mismatch_abs_max"] < LARGEST,
        f"the signed mean is below {MEAN:g}": abs(row["mismatch_k1"]) < MEAN,
        "nothing had moved before the update": row["log_s_abs_max"] < MEAN,
        "the step was taken": row["grad_norm"] > 0 and row["skipped_updates"] == 0,
    }
    return [promise for promise, kept in promises.items() if not kept]


def main() -> int:
    """Run both, print and write the table; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the figures go")
    parser.add_argument("--rope", choices=list(ROPES), help="only this one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of tools/long_context.yaml")
    arguments = parser.parse_args()
    tokens = load_recipe(RECIPE, arguments.overrides).rollout.max_answer_tokens
    rows, broken = [], []
    for rope in [arguments.rope] if arguments.rope else ROPES:
        with tempfile.TemporaryDirectory() as directory:
            rows.append(run(rope, arguments.overrides, Path(directory)))
        print(json.dumps(rows[-1], indent=1), flush=True)
        broken += [f"{rope}: not so: {promise}" for promise in faults(rows[-1], tokens)]
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(broken))
    return int(bool(broken))


if __name__ == "__main__":
    raise SystemExit(main())
