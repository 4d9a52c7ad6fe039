"""vLLM plugin (entry point group `vllm.general_plugins`): makes the weight transfer known in every vLLM process."""

from __future__ import annotations

import logging
import os

from gspo_megatron.cluster.child_processes import die_with_parent
from gspo_megatron.cluster.watchdog import answer_for_stacks
from gspo_megatron.models.vllm_engine import BACKEND

SERVER_VARIABLE = "GSPO_ROLLOUT_SERVER"
"""Set by `gspo_megatron.inference.server` to its index; its children inherit it."""
RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"


def is_of_weights(record: logging.LogRecord) -> bool:
    """A log filter: false for "RotaryEmbedding: Failed to load weights".

    vllm 0.32 says so at every update, of a table that it computes and no checkpoint holds.
    """
    layer = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
    return not (record.msg == "%s: Failed to load weights" and layer.endswith("RotaryEmbedding"))


def register() -> None:
    """Register the transfer engine; called by vLLM in each of its processes, possibly more than once.

    Within our server it also ties spawned children to their parent, which vLLM would leave behind after a kill -9 of
    the API process, and has them write their stacks when the watchdog requests it. A vLLM that somebody else starts in
    this environment is left as it is.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if SERVER_VARIABLE in os.environ:
        logging.getLogger(RELOAD_LOGGER).addFilter(is_of_weights)
        die_with_parent()
        answer_for_stacks()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "gspo_megatron.inference.vllm_worker", "ShardTransferEngine"
        )
