"""Live runs of what the main job is not: a Qwen2.5, and models whose head is the transposed embedding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.rollout.jobs import finish, rows_of, start

QWEN2 = ("model_type=qwen2", "num_experts=0", "num_experts_per_tok=0", "moe_intermediate_size=0")
TIED = "tie_word_embeddings=true"


@pytest.mark.parametrize(
    ("keys", "name", "tensor"),
    [
        (QWEN2, "Qwen2ForCausalLM", "model.layers.0.self_attn.q_proj.bias"),
        ((*QWEN2, TIED), "Qwen2ForCausalLM", "model.embed_tokens.weight"),
        ((TIED,), "Qwen3MoeForCausalLM", "model.layers.0.mlp.gate.weight"),
    ],
    ids=["qwen2", "qwen2, tied", "qwen3_moe, tied"],
)
def test_it_trains_and_its_weights_arrive(tmp_path: Path, keys: tuple[str, ...], name: str, tensor: str) -> None:
    """Two steps; after every update the canary compares vLLM's log-probs with the trainer's."""
    overrides = [f"model.architecture.{key}" for key in keys]
    job = start(tmp_path, *overrides, "trainer.max_steps=2", "trainer.tensor_parallel=2")
    output = finish(job)
    assert job.returncode == 0, output[-3000:]
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["architectures"] == [name] and config["tie_word_embeddings"] == (TIED in keys)
    rows = [row for row in rows_of(tmp_path) if row["step"]]
    assert [row["weight_version"] for row in rows] == [0, 1]
    for row in rows:
        assert row["canary_largest"] < 1e-4
        assert row["log_s_abs_max/minibatch_0"] <= 1e-6
    index = json.loads((tmp_path / "run" / "checkpoints" / "final" / "model.safetensors.index.json").read_text())
    assert tensor in index["weight_map"] and ("lm_head.weight" in index["weight_map"]) == (TIED not in keys)
