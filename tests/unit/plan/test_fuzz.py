"""Random recipes: never a traceback, always a verdict, and accepted layouts are megatron's own.

`make fuzz` tries 10,000.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config import RecipeError
from gspo_megatron.models import load_recipe, parse_recipe
from gspo_megatron.parallel import Layout
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.as_json import to_json
from gspo_megatron.plan.as_text import lines
from gspo_megatron.plan.command import add_arguments, run
from gspo_megatron.plan.explain import all_keys

MUTATIONS = int(os.environ.get("GSPO_FUZZ", "1000"))
BY_COMMAND = 50
"""Mutations that go through the command line, which reads files and so is slower."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 47, 64, 94, 128)
GENTLE = (
    "trainer.tensor_parallel", "trainer.pipeline_parallel", "trainer.context_parallel", "trainer.expert_parallel",
    "trainer.expert_tensor_parallel", "trainer.virtual_pipeline", "trainer.first_stage_layers",
    "trainer.last_stage_layers", "placement.nodes", "placement.gpus_per_node", "rollout.servers",
    "rollout.tensor_parallel", "batch.prompts", "batch.answers", "trainer.ranks", "placement.rollout_nodes",
)  # fmt: skip
"""Keys that get small numbers in every second mutation, so that some layouts are accepted."""
ANY = (
    None, True, False, 0, 1, 2, 3, 5, 7, 8, 13, 64, 1000, 1 << 20, 1 << 40, -1, -8, 0.0, 0.5, 1.0, 1e-9, 1e12, -0.5,
    float("nan"), float("inf"), "", "null", "gspo", "grpo", "cpu", "h100", "full", "sampler", "trainer", "none",
    "token", "a.py:f", [], [1, 2], ["tis"], {}, {"rope_type": "yarn"}, {"x": 1},
)  # fmt: skip


@lru_cache
def bases() -> list[dict[str, Any]]:
    return [load_recipe(path).model_dump(mode="json") for path in sorted(Path("recipes").glob("*.yaml"))]


def mutate(rng: random.Random) -> dict[str, Any]:
    """A shipped recipe with one to four keys changed, removed or misspelt."""
    tree = copy.deepcopy(rng.choice(bases()))
    keys = [key for key in all_keys() if not key.startswith(("model.path", "cold_start"))]
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        gentle = rng.random() < 0.5
        key = rng.choice(GENTLE if gentle else keys)
        value = rng.choice(SIZES) if gentle else rng.choice(ANY)
        *path, name = key.split(".")
        section: Any = tree
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            continue
        if rng.random() < 0.05:
            section.pop(name, None)
        elif rng.random() < 0.05:
            section[name + rng.choice("sx_")] = value
        else:
            section[name] = value
    return tree


def verdict(tree: dict[str, Any]) -> Layout | None:
    """The layout of an accepted recipe, None for a refused one; anything but a refusal by sentence raises."""
    try:
        plan = make_plan(parse_recipe(tree))
    except RecipeError as error:
        assert error.findings and all(finding.message and finding.fix for finding in error.findings)
        return None
    assert all(finding.message and finding.fix for finding in plan.findings)
    # A recipe says null, true and false.
    assert not re.search(r"\b(None|True|False)\b", "\n".join(map(str, plan.findings)))
    json.dumps(to_json(plan))
    assert [str(line) for line in lines(plan)]
    return None if plan.refused else plan.layout


@lru_cache
def accepted() -> set[Layout]:
    rng = random.Random(20261121)
    return {layout for layout in (verdict(mutate(rng)) for _ in range(MUTATIONS - BY_COMMAND)) if layout is not None}


def test_mutations_end_in_a_verdict() -> None:
    assert len(accepted()) >= 20, "hardly any mutation is accepted: the test below checks nothing"


def test_mutations_on_the_command_line_exit_with_0_or_2(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers())
    rng = random.Random(7)
    recipes = sorted(Path("recipes").glob("*.yaml"))
    keys = list(all_keys())
    for _ in range(BY_COMMAND):
        words = [f"{rng.choice(keys)}={json.dumps(rng.choice(ANY))}" for _ in range(rng.choice((1, 2)))]
        options = rng.choice(([], ["--json"], ["--nodes", "4"], ["--gpu", "b200"], ["--search", "--gpu", "h200"]))
        assert run(parser.parse_args(["plan", str(rng.choice(recipes)), *words, *options])) in (0, 2), words
    capsys.readouterr()


def groups(layout: Layout, along: tuple[str, ...], among: tuple[str, ...]) -> list[list[int]]:
    """Ranks that differ only in `along`, among the coordinates of one side of the layout."""
    fixed = [name for name in among if name not in along]
    table = [(tuple(getattr(layout.coordinates(rank), name) for name in fixed), rank) for rank in range(layout.world)]
    table.sort()
    return sorted([rank for _, rank in members] for _, members in itertools.groupby(table, key=lambda row: row[0]))


def test_accepted_rank_tables_are_those_of_megatron() -> None:
    from megatron.core.parallel_state import RankGenerator

    import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron

    order = "tp-cp-ep-dp-pp"
    dense = {"tp": "tensor", "cp": "context", "dp": "data", "pp": "pipeline"}
    expert = {"tp": "expert_tensor", "ep": "expert", "dp": "expert_data", "pp": "pipeline"}
    compared = 0
    for layout in (one for one in accepted() if one.world <= 1024):
        sizes = {"pp": layout.pipeline, "order": order}
        ours = RankGenerator(tp=layout.tensor, ep=1, dp=layout.data, cp=layout.context, **sizes)
        theirs = RankGenerator(tp=layout.expert_tensor, ep=layout.expert, dp=layout.expert_data, cp=1, **sizes)
        for generator, names in ((ours, dense), (theirs, expert)):
            for tokens in [*((token,) for token in names), ("tp", "dp"), ("tp", "pp")]:
                along = tuple(names[token] for token in tokens)
                wanted = sorted(sorted(group) for group in generator.get_ranks("-".join(tokens)))
                assert groups(layout, along, tuple(names.values())) == wanted, (layout, tokens)
                compared += 1
    assert compared > 100
