"""How a rank and a run start: the parts of one trainer rank, and its first weights or its newest checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from gspo_megatron.cluster.machines import takes_turns
from gspo_megatron.cluster.watchdog import Watchdog
from gspo_megatron.models import load_resolved
from gspo_megatron.policy import mesh
from gspo_megatron.policy.policy import Policy
from gspo_megatron.policy.specs import describe_parts, refuse_fallbacks
from gspo_megatron.run_dir import RunDir
from gspo_megatron.run_log import RunLog
from gspo_megatron.sinks.sink_threads import open_sinks
from gspo_megatron.trainer.checkpoint import find_latest, load
from gspo_megatron.trainer.cold_start import check_band, prepare_weights
from gspo_megatron.trainer.step import Trainer
from gspo_megatron.transport.controller_client import ControllerClient
from gspo_megatron.transport.identity import read_run_id


def open_rank(run_dir: Path, controller_url: str) -> Trainer:
    """Join the other trainer ranks and build the policy and the log of this one.

    Args:
        run_dir: the run directory, which holds the resolved recipe.
        controller_url: where the controller listens.
    """
    recipe = load_resolved(RunDir(run_dir).recipe)
    refuse_fallbacks(recipe)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    controller = ControllerClient(controller_url, os.environ["GSPO_JOB_KEY"])
    if torch.cuda.is_available() and takes_turns(recipe):
        # A server that starts measures its GPU's memory and counts what others use as its own; then it sleeps.
        controller.wait_ready(recipe.rollout.start_timeout)
    device = mesh.start_world()
    first = dist.get_rank() == 0
    sinks = open_sinks(recipe, run_dir, read_run_id(run_dir)) if first else None
    log = RunLog(run_dir, owns_terminal=first, sinks=sinks)
    Watchdog(run_dir, dist.get_rank(), dist.get_world_size(), log.pulse).start()
    policy = Policy(recipe, device)
    log.say(f"policy: {describe_parts()}")
    return Trainer(recipe, run_dir, policy, controller if first else None, log)


def start(trainer: Trainer, checkpoints: Path) -> int:
    """Prepare weights, reference policy, optimizer and servers, for a new run or from the newest checkpoint.

    Returns:
        Steps done.
    """
    newest = find_latest(checkpoints, trainer.log.say)
    if newest is None:
        trainer.log.rewind(-1)  # rows of an attempt that ended before its first checkpoint
    if newest is None or trainer.spec.kl != "none":
        prepare_weights(trainer)
    trainer.keep_reference()
    trainer.start_reinforcement()
    if newest is None:
        trainer.wait_for_servers()
    done = 0 if newest is None else load(trainer, newest)
    # Before the sync: after it the weights may be on the host.
    trainer.probe_routers()
    trainer.sync()
    if newest is None and trainer.recipe.planned_evaluation:
        check_band(trainer, trainer.evaluate(step=0))
    return done
