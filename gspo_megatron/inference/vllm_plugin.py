"""vLLM plugin (entry point group `vllm.general_plugins`): makes the weight transfer known in every vLLM process."""

from __future__ import annotations

import os

from gspo_megatron.cluster.child_processes import die_with_parent
from gspo_megatron.cluster.watchdog import answer_for_stacks

BACKEND = "gspo"
SERVER_VARIABLE = "GSPO_ROLLOUT_SERVER"
"""Set by `gspo_megatron.inference.server` to its index; its children inherit it."""


def register() -> None:
    """Register the transfer engine; called by vLLM in each of its processes, possibly more than once.

    Within our server it also ties spawned children to their parent, which vLLM would leave behind after a kill -9 of
    the API process, and has them write their stacks when the watchdog requests it. A vLLM that somebody else starts in
    this environment is left as it is.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if SERVER_VARIABLE in os.environ:
        die_with_parent()
        answer_for_stacks()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "gspo_megatron.inference.vllm_worker", "ShardTransferEngine"
        )
