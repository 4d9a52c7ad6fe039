"""Routing replay in a gloo world of 4 against transformers in float64 whose routers get the recorded experts."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models import load_recipe
from gspo_megatron.parallel import round_up
from gspo_megatron.plan.estimate.flops import route_bytes
from gspo_megatron.policy.weights import random_pieces
from tests.parallel.hf_model import KeepDouble, build_oracle, gradients, read_whole
from tests.parallel.policy_batch import SEQUENCES, SLOTS, make_samples, reported_routes
from tests.parallel.world import run_world

WORLD, TOKENS, CHANGED = 4, 48, 4
FULL = "trainer.recompute=full"
DEEP = ["trainer.pipeline_parallel=2", "trainer.context_parallel=2", "trainer.expert_parallel=2"]
CASES = {
    "PP2_VPP2_CP2_EP2_recompute": [*DEEP, "trainer.virtual_pipeline=2", FULL],
    "PP2_VPP2_CP2_EP2": [*DEEP, "trainer.virtual_pipeline=2"],
    "PP2_CP2_EP2_recompute_experts": [*DEEP, "trainer.recompute=selective"],
    "PP4_recompute": ["trainer.pipeline_parallel=4", FULL],
    "TP2_PP2_EP2_recompute": [DEEP[0], "trainer.tensor_parallel=2", "trainer.expert_parallel=2", FULL],
    "TP2_CP2": ["trainer.tensor_parallel=2", "trainer.context_parallel=2"],
}
MIXED = "trainer.dynamic_context_parallel=true"
CASES |= {
    "CP4_dynamic_EP2_recompute": [MIXED, "trainer.context_parallel=4", "trainer.expert_parallel=2", FULL],
    "PP2_VPP2_CP2_dynamic_EP2_recompute": [MIXED, *CASES["PP2_VPP2_CP2_EP2_recompute"]],
    "TP2_CP2_dynamic": [MIXED, *CASES["TP2_CP2"]],
}
"""Packs of one update are shared by 1, 2 and 4 ranks: `policy_batch.MIXED`."""


@pytest.fixture(scope="module")
def arch() -> Architecture:
    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), ["model.architecture.initializer_range=0.1"])
    return recipe.arch


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("replay")
    run_world("replay_worker.py", WORLD, CASES, directory)
    return directory


def routes_of_sequences(directory: Path, case: str, arch: Architecture, kind: str = "routes") -> list[Tensor]:
    """For each sequence [layers, length, k] what all ranks recorded together; every place is written once."""
    shape = (arch.num_hidden_layers, max(length for length, _ in SEQUENCES) + 8, arch.num_experts_per_tok)
    whole = [torch.full(shape, -1) for _ in SEQUENCES]
    for rank in range(WORLD):
        for slot in torch.load(directory / f"{case}-{kind}-{rank}.pt", weights_only=True):
            start = 0
            for member in slot["members"]:
                size = round_up(SEQUENCES[member][0], slot["multiple"])
                inside = (slot["rows"] >= start) & (slot["rows"] < start + size)
                for layer, chosen in zip(slot["layers"], slot["chosen"], strict=True):
                    at = slot["rows"][inside] - start
                    assert bool((whole[member][layer, at] == -1).all()), "two ranks recorded one token"
                    whole[member][layer, at] = chosen[inside]
                start += size
    return [routes[:, :length] for routes, (length, _) in zip(whole, SEQUENCES, strict=True)]


def forced_gradients(arch: Architecture, routes: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of the tests' loss with every token sent to the experts of `routes`, sequence by sequence."""
    model: Any = build_oracle(arch, read_whole(random_pieces(arch, CHANGED), arch))
    gates = [layer.mlp.gate for layer in model.model.layers]

    def choose(gate: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, gate.hidden_dim) @ gate.weight.T
        return logits, logits.gather(1, gate.forced).softmax(-1), gate.forced

    for gate in gates:
        gate.forward = types.MethodType(choose, gate)
    for (_, trained), sample, chosen in zip(SEQUENCES, make_samples(arch.vocab_size), routes, strict=True):
        for gate, experts in zip(gates, chosen, strict=True):
            gate.forced = experts
        ids = torch.as_tensor(sample.token_ids).long()
        with KeepDouble():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        if trained:
            (-logprobs[-trained:].sum() / TOKENS).backward()
    return gradients(arch, model)


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative error over all parameters, and where."""
    assert found.keys() == wanted.keys()
    return max((float((g.double() - wanted[name]).norm() / wanted[name].norm()), name) for name, g in found.items())


@pytest.mark.parametrize("case", CASES)
def test_replayed_gradient_equals_a_model_with_forced_experts(case: str, results: Path, arch: Architecture) -> None:
    wanted = forced_gradients(arch, routes_of_sequences(results, case, arch))
    found = torch.load(results / f"{case}.pt", weights_only=True)
    off, where = worst(found["replayed"], wanted)
    assert off <= 1e-5, f"{where} is off by {off:.1e}"
    assert worst(found["free"], wanted)[0] > 0.1, "without replay other experts are chosen"


@pytest.mark.parametrize("case", CASES)
def test_routes_that_a_sampler_reported_are_used_and_the_others_chosen(
    case: str, results: Path, arch: Architecture
) -> None:
    used = routes_of_sequences(results, case, arch, "reported")
    for sample, found in zip(make_samples(arch.vocab_size), used, strict=True):
        reported = torch.as_tensor(reported_routes(arch, sample)).long().transpose(0, 1)
        assert bool((found >= 0).all())
        assert torch.equal(found[reported >= 0], reported[reported >= 0])


@pytest.mark.parametrize("case", CASES)
def test_a_training_pass_replays_them_without_a_pass_before_it(case: str, results: Path) -> None:
    """Rows without any are routed as the scoring pass routed them, in the recomputation too."""
    found = torch.load(results / f"{case}.pt", weights_only=True)
    assert found["twice"].keys() == found["at once"].keys()
    assert all(torch.equal(found["twice"][name], gradient) for name, gradient in found["at once"].items())


@pytest.mark.parametrize("case", CASES)
def test_equal_weights_move_no_log_prob(case: str, results: Path) -> None:
    moved, changed, missed, _ = torch.load(results / f"{case}.pt", weights_only=True)["counts"].tolist()
    assert (moved, changed) == (0, 0)
    assert missed > 0, "the changed weights choose other experts"


@pytest.mark.parametrize("case", [case for case in CASES if "dynamic" not in case])
def test_replay_takes_a_byte_for_each_choice(case: str, results: Path, arch: Architecture) -> None:
    slots = torch.load(results / f"{case}-routes-0.pt", weights_only=True)
    multiple = slots[0]["multiple"]
    tokens = sum(round_up(SEQUENCES[member][0], multiple) for slot in SLOTS for member in slot)
    num_bytes = torch.load(results / f"{case}.pt", weights_only=True)["counts"][3]
    assert num_bytes / tokens == route_bytes(arch) == arch.num_hidden_layers * arch.num_experts_per_tok
