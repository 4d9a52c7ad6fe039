"""The policy on one GPU: the parity of the gloo worlds for the reference spec, bfloat16 bounds for both layer specs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.cluster.free_ports import free_ports
from gspo_megatron.models import load_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: the policy on CUDA is unseen"),
]
LENGTHS = (512, 384, 511, 257)
PLAIN = "trainer.distributed_optimizer=false"
ATOMICS = 1e-6
"""Plain torch adds a token's experts up by atomics on a GPU: more than two of them, in any order."""


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """A world of one rank, whose float32 is float32 and whose attention gives the same gradient twice."""
    from megatron.core import parallel_state

    from gspo_megatron.policy import mesh

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place, MASTER_PORT=str(free_ports(1)[0]))
    os.environ.update(NVIDIA_TF32_OVERRIDE="0", NVTE_ALLOW_NONDETERMINISTIC_ALGO="0")
    yield mesh.start_world()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(params=["reference", "transformer_engine"])
def spec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which layer spec the policy is built from."""
    if request.param == "reference":
        for module in ("model", "specs"):
            monkeypatch.setattr(f"gspo_megatron.policy.{module}.has_transformer_engine", lambda: False)
        return request.param
    # Asked only now: its extension can be found once megatron has imported it.
    from gspo_megatron.policy.specs import has_transformer_engine

    if not has_transformer_engine():
        pytest.skip("Transformer Engine is not installed")
    return request.param


def build(overrides: list[str], device: torch.device, dtype: torch.dtype) -> Any:
    """A policy of the parity rows' model."""
    from gspo_megatron.policy.policy import Policy

    return Policy(load_recipe(Path("recipes/tiny_moe.yaml"), overrides), device, dtype)


@pytest.mark.parametrize("model", ["moe", "dense, tied"])
def test_reference_spec_equals_the_oracle_in_float32(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    from tests.parallel.layouts import Row
    from tests.parallel.oracle import file_stem, write_oracle
    from tests.parallel.parity import broken_bounds
    from tests.parallel.parity_worker import run_case

    for module in ("model", "specs"):
        monkeypatch.setattr(f"gspo_megatron.policy.{module}.has_transformer_engine", lambda: False)
    # Megatron's router multiplies by Transformer Engine wherever that is installed, whatever the layers are made of.
    monkeypatch.setattr("megatron.core.transformer.moe.moe_utils.te_general_gemm", None)
    write_oracle(model, tmp_path)
    row = Row(1, "", model)
    case = {
        "name": row.name,
        "overrides": [*row.overrides, PLAIN],
        "model": file_stem(model),
        "spread": False,
        "forms": {"float32": ["packed", "padded"]},
        "fault": None,
    }
    monkeypatch.setattr("gspo_megatron.policy.weights.SHARD_BYTES", 150_000)
    result = run_case(case, "float32", tmp_path, device)
    for form in case["forms"]["float32"]:
        assert result[form]["shift"] <= ATOMICS
        result[form]["shift"] = 0.0
    assert broken_bounds(result) == []


def test_bfloat16_logprobs_are_near_the_float64_oracle(device: torch.device, spec: str) -> None:
    """The oracle holds the same rounded weights; what is left is the arithmetic in between, for the oracle's experts:
    where two experts are a tie to bfloat16, one that is chosen otherwise moves a token by some hundredths."""
    off = distances_from_oracle(device, [8 * length for length in LENGTHS])
    every = torch.cat(off)
    assert every.abs().max() <= 2e-2
    assert every.abs().mean() <= 2e-3
    assert max(abs(float(part.mean())) for part in off) <= 1e-4


def distances_from_oracle(device: torch.device, lengths: Sequence[int]) -> list[torch.Tensor]:
    """[length - 1] of each sequence: log-probs in bfloat16, packed, less the oracle's, whose experts it takes."""
    from gspo_megatron.data.packing import collate
    from gspo_megatron.policy.weights import random_pieces
    from tests.parallel.hf_model import build_oracle, chosen_experts, read_whole, token_logprobs

    longest = f"model.architecture.max_position_embeddings={max(lengths)}"
    policy = build([*long_model(), longest, "model.dtype=bfloat16"], device, torch.bfloat16)
    arch = policy.weights.arch
    read = random_pieces(arch, 1)
    policy.load(read)
    rounded = {name: tensor.bfloat16().float() for name, tensor in read_whole(read, arch).items()}
    oracle, samples = build_oracle(arch, rounded), make_long_samples(arch.vocab_size, lengths)
    with torch.no_grad(), chosen_experts(oracle) as experts:
        wanted = token_logprobs(oracle, [torch.as_tensor(sample.token_ids).long() for sample in samples])
    layers = arch.num_hidden_layers
    routed = [
        replace(sample, routes=torch.stack(experts[place : place + layers], dim=1).to(torch.int16).numpy())
        for place, sample in zip(range(0, len(experts), layers), samples, strict=True)
    ]
    (batch,) = policy.place([collate(routed)])
    routes = policy.routing.reported([batch], arch.num_experts_per_tok)
    (scored,) = policy.score([batch], routes=routes)
    found = scored.logprobs.float().cpu().double()
    starts = batch.cu_seqlens.tolist()
    return [found[start : start + len(logp)] - logp for start, logp in zip(starts[:-1], wanted, strict=True)]


def test_scoring_and_training_agree_bit_for_bit(device: torch.device, spec: str) -> None:
    from gspo_megatron.data.packing import collate
    from gspo_megatron.policy.policy import OptimizerSettings
    from gspo_megatron.policy.weights import random_pieces

    policy = build([*long_model(), "model.dtype=bfloat16"], device, torch.bfloat16)
    policy.load(random_pieces(policy.weights.arch, 1))
    batches = policy.place([collate(make_long_samples(policy.weights.arch.vocab_size))])
    (scored,) = policy.score(batches)
    seen = []

    def loss(_: Any, now: Any, __: int) -> Any:
        seen.append(now.logprobs.detach())
        return -now.logprobs.mean(), {}

    policy.start_optimizer(OptimizerSettings(1e-3, (0.9, 0.95), 1e-8, 0.0, 1.0))
    policy.train(batches, loss, 1e-3)
    assert torch.equal(seen[0], scored.logprobs)


def test_layer_inputs_in_host_memory_free_the_device_and_change_nothing(device: torch.device, spec: str) -> None:
    from gspo_megatron.data.packing import collate
    from gspo_megatron.policy.policy import OptimizerSettings
    from gspo_megatron.policy.weights import random_pieces

    def step(offloads: bool) -> tuple[dict[str, torch.Tensor], int]:
        asked = [
            "model.dtype=bfloat16",
            "trainer.recompute=full",
            f"trainer.offload_activations={str(offloads).lower()}",
        ]
        policy = build([*long_model(), *asked], device, torch.bfloat16)
        policy.load(random_pieces(policy.weights.arch, 1))
        policy.start_optimizer(OptimizerSettings(1e-3, (0.9, 0.95), 1e-8, 0.0, 1.0))
        batches = policy.place([collate(make_long_samples(policy.weights.arch.vocab_size))])
        held = []

        def loss(_: Any, now: Any, __: int) -> Any:
            held.append(torch.cuda.memory_allocated())
            return -now.logprobs.mean(), {}

        before = torch.cuda.memory_allocated()
        policy.train(batches, loss, 1e-3)
        return {name: tensor.clone() for name, tensor in policy.export()}, held[0] - before

    (plain, kept), (offloaded, left) = step(False), step(True)
    assert all(torch.equal(tensor, offloaded[name]) for name, tensor in plain.items())
    arch = load_recipe(Path("recipes/tiny_moe.yaml"), long_model()).arch
    # The last layer's input, and the states that the head reads, stay longest.
    assert kept - left >= (arch.num_hidden_layers - 1) * sum(LENGTHS) * arch.hidden_size * 2


def test_offloading_frees_the_optimizer_and_changes_nothing(device: torch.device, spec: str) -> None:
    from gspo_megatron.data.packing import collate
    from gspo_megatron.policy.policy import OptimizerSettings
    from gspo_megatron.policy.weights import random_pieces

    def steps(offloads: bool) -> dict[str, torch.Tensor]:
        policy = build([*long_model(), "model.dtype=bfloat16"], device, torch.bfloat16)
        policy.load(random_pieces(policy.weights.arch, 1))
        policy.start_optimizer(OptimizerSettings(1e-3, (0.9, 0.95), 1e-8, 0.0, 1.0))
        batches = policy.place([collate(make_long_samples(policy.weights.arch.vocab_size))])
        for _ in range(2):
            policy.train(batches, lambda _, now, __: (-now.logprobs.mean(), {}), 1e-3)
            if offloads:
                parameters = sum(p.numel() for p in policy.chunks[0].parameters())
                before = torch.cuda.memory_allocated()
                policy.offload()
                # Main weights, two moments and the gradient buffer, float32 each, and the weights.
                assert before - torch.cuda.memory_allocated() >= 0.95 * 18 * parameters
                policy.restore()
        return {name: tensor.clone() for name, tensor in policy.export()}

    plain, offloaded = steps(False), steps(True)
    assert all(torch.equal(tensor, offloaded[name]) for name, tensor in plain.items())


def long_model() -> list[str]:
    """Shapes that bfloat16 kernels take: widths in multiples of 64, heads of 64."""
    shape = {
        "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "moe_intermediate_size": 128, "max_position_embeddings": 1024, "initializer_range": 0.02,
    }  # fmt: skip
    return [f"model.architecture.{key}={value}" for key, value in shape.items()]


def make_long_samples(vocab_size: int, lengths: Sequence[int] = LENGTHS) -> list[Any]:
    """Ragged sequences, all trained but the first token."""
    import numpy as np

    from gspo_megatron.types import Sample, SampleRef

    generator = np.random.default_rng(0)
    samples = []
    for index, length in enumerate(lengths):
        mask = np.arange(length) > 0
        ref = SampleRef("", index, 0, 1, length - 1, 0.0, "stop", ())
        tokens = generator.integers(0, vocab_size, length).astype(np.int32)
        samples.append(Sample(tokens, mask, np.zeros(length, np.float32), ref))
    return samples
