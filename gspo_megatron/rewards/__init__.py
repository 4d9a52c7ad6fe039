"""Rewards: the score of a response."""

from gspo_megatron.rewards.scorer import AsyncScorer, Scorer, Verdict, make_scorer

__all__ = ["AsyncScorer", "Scorer", "Verdict", "make_scorer"]
