"""A user's own reward of the live test: awaited, with named parts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from gspo_megatron.rewards.reward_input import RewardInput


async def score(problem: Mapping[str, Any], response: RewardInput) -> dict[str, float]:
    """1 for the right answer, and what it cost."""
    await asyncio.sleep(0)
    return {"right": float(response.answer == problem["answer"]), "_tokens": len(response.token_ids)}


def first_token(problem: Mapping[str, Any], response: RewardInput) -> float:
    """Differs within every group, whatever the weights."""
    return float(response.token_ids[0] % 2)
