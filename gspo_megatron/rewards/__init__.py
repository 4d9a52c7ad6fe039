"""Rewards: the score in [0, 1] of a response's text."""

from gspo_megatron.rewards.scorer import SCORES, Scorer, make_scorer

__all__ = ["SCORES", "Scorer", "make_scorer"]
