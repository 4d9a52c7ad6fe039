"""How much the trainer searches for even packs: no longer than that can gain."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gspo_megatron.data.balance_search import Search
from gspo_megatron.models import load_recipe
from gspo_megatron.parallel import Layout
from gspo_megatron.trainer.batches import Batcher


@pytest.mark.parametrize(("name", "median", "searches"), [("tiny_moe", 20, False), ("qwen3_30b_a3b_gspo", 8000, True)])
def test_a_search_is_made_where_it_can_pay(
    name: str, median: int, searches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tiny model it took 7 % of a step, and could gain a hundredth of that."""
    rounds = list[int]()
    draw = Search._draw

    def count(self: Search, *given: Any) -> Any:
        rounds.append(1)
        return draw(self, *given)

    monkeypatch.setattr(Search, "_draw", count)
    recipe, layout = load_recipe(Path(f"recipes/{name}.yaml")), Layout(4)
    policy: Any = SimpleNamespace(layout=layout, at=layout.coordinates(0))
    lengths = np.random.default_rng(0).lognormal(np.log(median), 0.3, 128).astype(int).clip(2, 32_000).tolist()
    packs = Batcher(recipe, policy, None)._pack(lengths)  # type: ignore[arg-type]
    assert packs and bool(rounds) == searches


def test_an_empty_mini_batch_has_no_packs() -> None:
    """Every response of it was left out."""
    layout = Layout(2)
    policy: Any = SimpleNamespace(layout=layout, at=layout.coordinates(0))
    assert Batcher(load_recipe(Path("recipes/tiny_moe.yaml")), policy, None)._pack([]) == []  # type: ignore[arg-type]
