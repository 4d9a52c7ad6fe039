"""Environments: tools that reply to a model between its turns, in token ids."""

from gspo_megatron.environments.environment import Environment, Step, TokenCodec, Turn
from gspo_megatron.environments.table import ENVIRONMENTS, make_step, read_call_ids

__all__ = ["ENVIRONMENTS", "Environment", "Step", "TokenCodec", "Turn", "make_step", "read_call_ids"]
