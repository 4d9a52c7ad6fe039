"""What the sampler's routes do for log-probs: a bfloat16 sampler against a float32 trainer, with them and without.

    python tools/compare_routes.py MODEL [--out FILE] [key=value ...]

MODEL is a Hugging Face directory of the model of `recipes/tiny_moe.yaml`, e.g. `checkpoints/final` of `make train`. One
step of the recipe in bfloat16, with updates off, has vLLM sample a batch and record the routes. Then the float32 policy
scores the stored responses, once with the routes and once with its own choices: with the weights that the servers got,
and with those before they were rounded. `tokens_for_band`: the length from which the standard deviation of log s, which
the mismatch alone gives a response, is a tenth of the paper's band of 3e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.cluster.free_ports import free_ports
from gspo_megatron.data.sample_index import INDEX, read_refs
from gspo_megatron.data.store import SampleStore
from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import Piece
from gspo_megatron.policy import mesh
from gspo_megatron.policy.policy import Policy
from gspo_megatron.policy.weights import safetensors_pieces
from gspo_megatron.run_dir import RunDir
from gspo_megatron.run_log import read_rows
from gspo_megatron.trainer.batches import Batcher
from gspo_megatron.types import SampleRef

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "tiny_moe.yaml"
BAND = 3e-4
STEP = (
    "cold_start=null", "model.dtype=bfloat16", "objective.replay=sampler", "optimizer.lr=0", "trainer.max_steps=1",
    "evaluation.every=0", "evaluation.problems=0", "weight_update.canary_bound=20", "checkpoint.every=0",
)  # fmt: skip
KEPT = ("experts/sampler_disagreement", "mismatch_sampled/")
"""Beginnings of the names of the metrics of the bfloat16 trainer that make the table."""


def main() -> None:
    """Print one JSON object, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("--out", type=Path, help="where the result goes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of recipes/tiny_moe.yaml")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        settings = [f"model.path={chosen.model.resolve()}", *chosen.overrides]
        run = RunDir(Path(place) / "run")
        command = [sys.executable, "-m", "gspo_megatron.cli", "train", str(RECIPE), *settings, *STEP]
        subprocess.run([*command, f"run.directory={run.path}"], check=True, stdout=sys.stderr)
        row = read_rows(run.path)[-1]
        found: dict[str, Any] = {"bfloat16_trainer": {key: row[key] for key in row if key.startswith(KEPT)}}
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_ports(1)[0]), WORLD_SIZE="1", RANK="0")
        found["float32_trainer"] = score_again(run, settings, chosen.model)
    text = json.dumps(found, indent=1)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n")


def score_again(run: RunDir, settings: Sequence[str], model: Path) -> dict[str, Any]:
    """The mismatch of the float32 policy by weights and routes."""
    recipe = load_recipe(RECIPE, [*settings, "objective.replay=sampler", "trainer.ranks=1"])
    policy = Policy(recipe, mesh.start_world(), torch.float32)
    exact = safetensors_pieces(model, recipe.arch)

    def rounded(piece: Piece) -> Tensor:
        return exact(piece).bfloat16().float()

    store = SampleStore(run.samples)
    (index,) = INDEX.find(store.directory).values()
    refs = [ref for ref in read_refs(index) if ref.trained_length]
    found = {}
    for name, read in (("weights of the servers", rounded), ("weights before rounding", exact)):
        policy.load(read)
        found[name] = {kind: compare(policy, store, refs, kind == "routes") for kind in ("routes", "own choices")}
    dist.destroy_process_group()
    return found


def compare(policy: Policy, store: SampleStore, refs: Sequence[SampleRef], replays: bool) -> dict[str, float]:
    """Differences of trained tokens and of responses, trainer - sampler, nats."""
    _, batches = Batcher(policy.recipe, policy, store).place_refs(refs)
    routes = policy.routing.reported(batches, policy.recipe.arch.num_experts_per_tok) if replays else None
    tokens: list[np.ndarray] = []
    for batch, scored in zip(batches, policy.score(batches, routes=routes), strict=True):
        shift = (scored.logprobs - batch.rollout_logprobs).double()
        starts = batch.cu_seqlens.tolist()
        for start, end in pairwise(starts):
            mine = shift[start:end][batch.loss_mask[start:end]]
            if len(mine):
                tokens.append(mine.numpy())
    return describe(tokens)


def describe(responses: Sequence[np.ndarray]) -> dict[str, float]:
    """Of [responses] of [tokens] differences."""
    every = np.concatenate(responses)
    log_s = np.array([response.mean() for response in responses])
    deviation = float(every.std())
    return {
        "tokens": len(every),
        "mean": float(np.abs(every).mean()),
        "p99": float(np.quantile(np.abs(every), 0.99)),
        "largest": float(np.abs(every).max()),
        "mismatch_k3": float((np.expm1(every) - every).mean()),
        "signed_mean": float(every.mean()),
        "deviation": deviation,
        "log_s_deviation": float(log_s.std()),
        "log_s_largest": float(np.abs(log_s).max()),
        "tokens_for_band": (deviation / (0.1 * BAND)) ** 2,
    }


if __name__ == "__main__":
    main()
