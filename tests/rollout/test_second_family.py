"""A live run of the second model family: a dense, untied Qwen2.5 with a bias of queries, keys and values."""

from __future__ import annotations

import json
from pathlib import Path

from tests.rollout.jobs import finish, rows_of, start

QWEN2 = [
    f"model.architecture.{key}"
    for key in ("model_type=qwen2", "num_experts=0", "num_experts_per_tok=0", "moe_intermediate_size=0")
]


def test_it_trains_and_its_weights_arrive(tmp_path: Path) -> None:
    """Two steps; after every update the canary compares vLLM's log-probs with the trainer's."""
    job = start(tmp_path, *QWEN2, "trainer.max_steps=2", "trainer.tensor_parallel=2")
    output = finish(job)
    assert job.returncode == 0, output[-3000:]
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and not config["tie_word_embeddings"]
    rows = [row for row in rows_of(tmp_path) if row["step"]]
    assert [row["weight_version"] for row in rows] == [0, 1]
    for row in rows:
        assert row["canary_largest"] < 1e-4
        assert row["log_s_abs_max/minibatch_0"] <= 1e-6
    index = json.loads((tmp_path / "run" / "checkpoints" / "final" / "model.safetensors.index.json").read_text())
    assert "model.layers.0.self_attn.q_proj.bias" in index["weight_map"]
