"""How a run begins: from its starting weights, or from its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

from gspo_megatron.trainer.checkpoint import find_latest, load
from gspo_megatron.trainer.cold_start import check_band, prepare_weights
from gspo_megatron.trainer.step import Trainer


def start(trainer: Trainer, checkpoints: Path) -> int:
    """Weights, reference policy, optimizer and servers as a new run or the newest checkpoint wants them.

    Returns:
        Steps done.
    """
    newest = find_latest(checkpoints)
    if newest is None or trainer.spec.kl != "none":
        prepare_weights(trainer)
    trainer.keep_reference()
    trainer.start_reinforcement()
    if newest is None:
        trainer.wait_for_servers()
    done = 0 if newest is None else load(trainer, newest)
    # First: after the update the weights may be on the host.
    trainer.probe_routers()
    trainer.sync()
    if newest is None and trainer.recipe.evaluation.problems:
        check_band(trainer, trainer.evaluate(step=0))
    return done
