"""A whole job whose servers hold fp8: the trainer quantises, vLLM's own CPU kernels compute with bytes and scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM

from gspo_megatron.data.sample_index import read_samples
from gspo_megatron.data.store import SampleStore
from tests.rollout.jobs import finish, rows_of, start
from tests.rollout.rounded_model import NEEDS_AVX512, round_matrix, write_model
from tests.rollout.serves_fp8 import HERE

FP8 = (
    "model.dtype=bfloat16", "rollout.weight_dtype=fp8", "weight_update.canary_bound=3",
    # Four heads of 32 are a block.
    "model.architecture.num_key_value_heads=4",
)  # fmt: skip
# Experts of 128 rows lie on two tensor-parallel ranks of the trainer, so a block does too.
LAYOUT = ("trainer.tensor_parallel=2", "trainer.expert_tensor_parallel=2")


@NEEDS_AVX512
def test_what_the_trainer_quantises_is_what_the_servers_compute_with(tmp_path: Path) -> None:
    """Responses of the second version, scored with the exported weights as they are, and rounded to bytes and scales.

    After three steps of fine-tuning no response earns anything, so what is exported at the end is every version's.
    vLLM's CPU kernels leave activations in bfloat16, so what is left in the second case is the rounding of bfloat16.
    It exchanges an expert now and then, which is why medians are compared.
    """
    job = start(tmp_path, *FP8, *LAYOUT, "trainer.max_steps=2", module=HERE)
    said = finish(job)
    assert job.returncode == 0, said[-3000:]
    rows = [row for row in rows_of(tmp_path) if row["step"]]
    assert [row["weight_version"] for row in rows] == [0, 1] and not any(row["grad_norm"] for row in rows)
    assert all(row["received_over_needed"] == 1.0 for row in rows)
    run = tmp_path / "run"
    exported = run / "checkpoints" / "final"
    tensors = {name: value for file in exported.glob("*.safetensors") for name, value in load_file(file).items()}
    rounded = {name: round_matrix(name, value) for name, value in tensors.items()}
    plain, rounded = (
        median_difference(run / "samples", write_model(exported, tmp_path / kind, values))
        for kind, values in (("plain", tensors), ("rounded", rounded))
    )
    assert rounded < 0.03 and rounded < plain / 5, (rounded, plain)


@torch.no_grad()
def median_difference(samples: Path, directory: Path) -> float:
    """|sampler's log-prob - transformers'| of the tokens that the second version sampled."""
    model = Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()
    store, found = SampleStore(samples), []
    for sample in read_samples(samples):
        if {segment.version for segment in sample.ref.segments} != {1}:
            continue
        token_ids, start_of_answer, logprobs = store.read(sample.ref)
        ids = torch.tensor(token_ids.tolist())
        scored = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        found.append(np.abs(scored.numpy()[start_of_answer - 1 :] - logprobs))
    return float(np.median(np.concatenate(found)))
