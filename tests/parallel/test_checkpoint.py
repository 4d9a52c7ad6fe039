"""A checkpoint of any layout gives any other one every bit that the next optimizer step depends on."""

from __future__ import annotations

import json

import pytest

from tests.parallel.world import run_world

QWEN2 = [
    f"model.architecture.{key}"
    for key in ("model_type=qwen2", "num_experts=0", "num_experts_per_tok=0", "moe_intermediate_size=0")
]
OVERRIDES = {
    "DP4": [],
    "EP4": ["trainer.expert_parallel=4"],
    "TP2_PP2": ["trainer.tensor_parallel=2", "trainer.pipeline_parallel=2"],
    "TP2_EP2": ["trainer.tensor_parallel=2", "trainer.expert_parallel=2"],
    "TP2_ETP2": ["trainer.tensor_parallel=2", "trainer.expert_tensor_parallel=2"],
    "CP2_EP2": ["trainer.context_parallel=2", "trainer.expert_parallel=2"],
    "PP2_VPP2_EP2": ["trainer.pipeline_parallel=2", "trainer.virtual_pipeline=2", "trainer.expert_parallel=2"],
    "TP2_PP2_qwen2": [*QWEN2, "trainer.tensor_parallel=2", "trainer.pipeline_parallel=2"],
    "TP4_qwen2": [*QWEN2, "trainer.tensor_parallel=4"],
    "DP4_bf16": ["model.dtype=bfloat16"],
    **{
        f"{name}_ppo": ["objective.preset=ppo", *(f"trainer.{word}" for word in words)]
        for name, words in {
            "TP2_PP2": ("tensor_parallel=2", "pipeline_parallel=2"),
            "CP2_EP2": ("context_parallel=2", "expert_parallel=2"),
            "PP2_VPP2": ("pipeline_parallel=2", "virtual_pipeline=2"),
        }.items()
    },
    "TP2_EP2_bf16": ["trainer.tensor_parallel=2", "trainer.expert_parallel=2", "model.dtype=bfloat16"],
}
SPREAD = "_spread"
"""With the distributed optimizer."""
PAIRS = [
    ("DP4", "DP4"),
    ("DP4", "TP2_PP2"),
    ("TP2_PP2", "DP4"),
    ("EP4", "TP2_EP2"),
    ("TP2_ETP2", "PP2_VPP2_EP2"),
    ("PP2_VPP2_EP2", "CP2_EP2"),
    ("TP2_PP2_spread", "TP2_PP2_spread"),
    ("DP4_spread", "TP2_EP2"),
    ("TP2_PP2", "EP4_spread"),
    ("PP2_VPP2_EP2_spread", "CP2_EP2_spread"),
    ("CP2_EP2_spread", "TP2_ETP2_spread"),
    ("TP2_PP2_qwen2", "TP4_qwen2"),
    ("TP4_qwen2", "TP2_PP2_qwen2"),
    ("TP2_PP2_ppo", "TP2_PP2_ppo"),
    ("TP2_PP2_ppo", "CP2_EP2_ppo_spread"),
    ("CP2_EP2_ppo_spread", "PP2_VPP2_ppo"),
    ("DP4_bf16", "DP4_bf16"),
    ("TP2_EP2_bf16_spread", "DP4_bf16"),
    ("DP4_bf16", "TP2_EP2_bf16_spread"),
]
SMALLER = ["TP2_PP2", "DP4_spread"]
"""Checkpoints of four ranks that two ranks go on from."""


def case(name: str) -> dict:
    return {"overrides": OVERRIDES[name.removesuffix(SPREAD)], "spread": name.endswith(SPREAD)}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    directory = tmp_path_factory.mktemp("checkpoint")
    sources, targets = {source for source, _ in PAIRS}, {target for _, target in PAIRS}
    cases = {"save": {name: case(name) for name in sorted(sources)}, "layouts": {name: case(name) for name in targets}}
    run_world("checkpoint_worker.py", 4, {**cases, "load": PAIRS}, directory)
    found = json.loads((directory / "verdicts.json").read_text())
    smaller = {"save": {}, "layouts": {"TP2_EP2": case("TP2_EP2")}, "load": [(name, "TP2_EP2") for name in SMALLER]}
    run_world("checkpoint_worker.py", 2, smaller, directory)
    of_two = json.loads((directory / "verdicts.json").read_text())
    return found | {f"{pair} of two": verdict for pair, verdict in of_two.items()}


NAMES = [f"{source} -> {target}" for source, target in PAIRS] + [f"{name} -> TP2_EP2 of two" for name in SMALLER]


@pytest.mark.parametrize("pair", NAMES)
def test_weights_and_moments_come_back_bit_for_bit(pair: str, verdicts: dict[str, dict[str, float]]) -> None:
    assert verdicts[pair]["restored"] == 0


@pytest.mark.parametrize("pair", [name for name in NAMES if "bf16" not in name])
def test_the_next_step_is_the_same(pair: str, verdicts: dict[str, dict[str, float]]) -> None:
    """Compared after the step: a wrong step count leaves the weights and the gradient norm before it as they are."""
    assert verdicts[pair]["norm"] <= 1e-6
    assert verdicts[pair]["after"] <= 1e-6


@pytest.mark.parametrize("pair", [name for name in NAMES if name.split(" -> ")[0] == name.split(" -> ")[1]])
def test_the_same_layout_goes_on_with_the_same_bits(pair: str, verdicts: dict[str, dict[str, float]]) -> None:
    assert verdicts[pair]["after_moments"] == 0
