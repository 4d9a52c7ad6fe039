"""Environments: tools that reply to a model between its turns, in token ids; and the form of agents."""

from gspo_megatron.environments.agent_contract import ClientSettings
from gspo_megatron.environments.environment import Environment, ModelTurn, Reply, Step, TokenCodec, Turn
from gspo_megatron.environments.table import ENVIRONMENTS, make_step, read_call_ids
from gspo_megatron.environments.tool_calls import ToolCall

__all__ = [
    "ENVIRONMENTS",
    "ClientSettings",
    "Environment",
    "ModelTurn",
    "Reply",
    "Step",
    "TokenCodec",
    "ToolCall",
    "Turn",
    "make_step",
    "read_call_ids",
]
