"""Text and answer -> score in [0, 1]: a table of names."""

from gspo_megatron.rewards.scorer import SCORES, Scorer, make_scorer

__all__ = ["SCORES", "Scorer", "make_scorer"]
