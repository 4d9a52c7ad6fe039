"""The Megatron policy in a gloo world of 2 against transformers in float64, every layout in one started world."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gspo_megatron.config import load
from gspo_megatron.config.model import Architecture
from gspo_megatron.objective import ObjectiveSpec, runtime_warnings
from tests.parallel.hf_model import build_oracle, gradients, token_logprobs
from tests.parallel.policy_batch import SEQUENCES, make_samples, old_logprobs
from tests.parallel.world import run_world
from tests.reference import clip

LAYOUTS = {
    "DP2": [],
    "TP2": ["trainer.tensor_parallel=2"],
    "PP2": ["trainer.pipeline_parallel=2"],
    "EP2": ["trainer.expert_parallel=2"],
    "CP2": ["trainer.context_parallel=2"],
    "TP2_EP2": ["trainer.tensor_parallel=2", "trainer.expert_parallel=2"],
    "TP2_ETP2": ["trainer.tensor_parallel=2", "trainer.expert_tensor_parallel=2"],
    "PP2_VPP2": ["trainer.pipeline_parallel=2", "trainer.virtual_pipeline=2"],
    "PP2_recompute": ["trainer.pipeline_parallel=2", "trainer.recompute=full"],
}


@pytest.fixture(scope="module")
def arch() -> Architecture:
    recipe = load(Path("recipes/tiny_moe.yaml"), ["model.architecture.initializer_range=0.1"])
    assert recipe.model.architecture is not None
    return recipe.model.architecture


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    cases = [{"name": name, "overrides": overrides} for name, overrides in LAYOUTS.items()]
    stale = {"name": "stale", "overrides": LAYOUTS["PP2"], "stale": True}
    run_world("policy_worker.py", 2, [*cases, stale], directory)
    return directory


@pytest.fixture(scope="module")
def oracle(arch: Architecture, results: Path) -> dict:
    """Loss and gradients by the definition of GSPO on transformers' log-probs, sequence by sequence."""
    tensors = torch.load(results / "DP2.pt", weights_only=True)["loaded"]
    model = build_oracle(arch, tensors)
    samples = make_samples(arch.vocab_size)
    logprobs = token_logprobs(model, [torch.as_tensor(sample.token_ids).long() for sample in samples])
    terms = []
    for index, ((_, trained), sample, logp) in enumerate(zip(SEQUENCES, samples, logprobs, strict=True)):
        if trained:
            now = logp[-trained:]
            old = now.detach() - old_logprobs(trained, index)
            ratio = torch.exp((now - old).sum() / trained)
            terms.append(clip(ratio, torch.tensor(sample.advantage), 7e-3, 9e-3))
    loss = -torch.stack(terms).mean()
    loss.backward()
    scale = sum(abs(sample.advantage) for (_, trained), sample in zip(SEQUENCES, samples, strict=True) if trained)
    return {"loss": loss.item(), "scale": scale / len(terms), "gradients": gradients(arch, model), "weights": tensors}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_the_oracle(results: Path, oracle: dict, layout: str) -> None:
    found = torch.load(results / f"{layout}.pt", weights_only=True)
    assert abs(found["loss"] - oracle["loss"]) <= 1e-6 * oracle["scale"]
    wanted = oracle["gradients"]
    assert found["gradients"].keys() == wanted.keys()
    off = {
        name: float((g.double() - wanted[name]).norm() / wanted[name].norm()) for name, g in found["gradients"].items()
    }
    worst = max(off, key=lambda name: off[name])
    assert off[worst] <= 1e-5, f"{worst} is off by {off[worst]:.1e}"
    total = math.sqrt(sum(float(g.norm()) ** 2 for g in wanted.values()))
    assert found["norm"] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scoring_and_training_forward_agree_bit_for_bit(results: Path, layout: str) -> None:
    found = torch.load(results / f"{layout}.pt", weights_only=True)
    assert (found["exact"], found["shift"]) == (1.0, 0.0)


def test_one_stale_weight_moves_the_first_mini_batch(results: Path) -> None:
    """One parameter of one rank changed between scoring and training: the identity that every run checks must break."""
    shift = torch.load(results / "stale.pt", weights_only=True)["shift"]
    assert shift > 1e-6
    metrics = {"log_s_abs_max/minibatch_0": shift, "clip_fraction_tokens/minibatch_0": 0.0}
    found = [finding.code for finding in runtime_warnings(ObjectiveSpec.preset("gspo"), metrics)]
    assert "first-minibatch-moved" in found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_gives_back_the_loaded_weights(results: Path, oracle: dict, layout: str) -> None:
    found = torch.load(results / f"{layout}.pt", weights_only=True)["weights"]
    assert found.keys() == oracle["weights"].keys()
    assert all(torch.equal(tensor, oracle["weights"][name]) for name, tensor in found.items())
