"""Which GPU a recipe is planned for: named, found by its name, described, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.cluster import machines
from gspo_megatron.cluster.machines import DEVICES, GIB, machine_of
from gspo_megatron.cluster.visible_devices import Gpu
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.rules.layout import layout_of, spans

A3B, A22B = Path("recipes/qwen3_30b_a3b_gspo.yaml"), Path("recipes/qwen3_235b_a22b_gspo.yaml")
DEVICE = "placement.device={memory: 60, flops: 376, memory_bandwidth: 1600, link: 196, network: 25, per_node: 16}"


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H20", "h20"), ("NVIDIA H800", "h800"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 NVL 94GB", "h100"), ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"), ("NVIDIA B300 SXM6 AC", "b300"), ("NVIDIA GB200", "gb200"),
        ("NVIDIA A100-SXM4-40GB", None), ("NVIDIA H100 PCIe", None), ("NVIDIA GH200 480GB", None),
        ("NVIDIA A800-SXM4-80GB", None), ("Tesla V100-SXM2-32GB", None), ("NVIDIA L40S", None), ("", None),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_its_name_or_refused(model: str, kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "list_gpus", lambda: [Gpu("0", model)] * 4)
    recipe = load_recipe(A3B, ["placement.gpu=null"])
    if kind is None:
        with pytest.raises(RecipeError, match=r"unknown-gpu.* placement\.gpu: .*placement\.device"):
            machine_of(recipe)
    else:
        found = machine_of(recipe)
        assert (found.device.kind, found.per_node) == (kind, 8), "the recipe says 8"


def test_every_kind_can_be_planned() -> None:
    for kind in DEVICES:
        if kind != "cpu":
            plan = make_plan(load_recipe(A3B, [f"placement.gpu={kind}"]))
            assert plan.compute is not None and plan.compute.seconds_per_step > 0, kind


def test_a_faster_gpu_is_not_planned_slower() -> None:
    order = ("a100", "h100", "h200", "b200", "b300")
    times = []
    for kind in order:
        plan = make_plan(load_recipe(A3B, [f"placement.gpu={kind}"]))
        assert plan.compute is not None
        times.append(plan.compute.seconds_per_step)
    assert times == sorted(times, reverse=True)


def test_a_described_gpu_takes_its_data_and_its_node() -> None:
    recipe = load_recipe(A3B, ["placement.gpu=null", "placement.gpus_per_node=null", DEVICE])
    found = machine_of(recipe)
    assert (found.device.memory, found.device.matmul, found.per_node) == (60 * GIB, 376e12, 16)
    assert (found.device.bandwidth, found.device.node_link, found.device.network) == (1.6e12, 196e9, 25e9)


def test_two_descriptions_of_the_gpu_are_refused() -> None:
    with pytest.raises(RecipeError, match="gpu=h100 and device both describe the GPU; remove one"):
        load_recipe(A3B, [DEVICE])


def test_the_domain_of_a_rack_is_inside() -> None:
    """EP 32 of a gb200 job crosses nodes of four GPUs and stays on NVLink."""
    wide = ["placement.gpus_per_node=null", "placement.nodes=32", "trainer.expert_parallel=16"]
    rack, boxes = (machine_of(load_recipe(A22B, [*wide, f"placement.gpu={kind}"])) for kind in ("gb200", "b200"))
    assert (rack.per_node, rack.domain, boxes.per_node, boxes.domain) == (4, 64, 8, 8)
    trainer = load_recipe(A22B, [*wide, "placement.gpu=gb200"]).trainer
    for machine, inside in ((rack, True), (boxes, False)):
        found = {span.name: span.inside_node for span in spans(layout_of(trainer, machine.ranks), machine.domain)}
        assert found["expert"] is inside
