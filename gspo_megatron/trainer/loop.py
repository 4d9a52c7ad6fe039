"""The training loop. Every trainer rank runs it.

python -m gspo_megatron.trainer.loop --run-dir DIR --controller URL
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

from gspo_megatron.cluster.child_processes import die_with_parent
from gspo_megatron.cluster.exit_codes import FAILED, OK, STOPPED
from gspo_megatron.config import RecipeError
from gspo_megatron.report.page import write_report
from gspo_megatron.report.plots import write_plot
from gspo_megatron.trainer.checkpoint import CheckpointError, CheckpointWriter
from gspo_megatron.trainer.preemption import StopRequest
from gspo_megatron.trainer.start import open_rank, start
from gspo_megatron.trainer.step import Trainer
from gspo_megatron.transport.controller_client import ControllerError
from gspo_megatron.transport.weights.wire import TransferError


def train(trainer: Trainer) -> bool:
    """Reinforcement learning: one rollout batch, `batch.updates` optimizer steps, new weights for the servers.

    Returns:
        Whether all steps are done; False when the run saved a checkpoint and stopped because it was asked to.
    """
    recipe, log, run, every = trainer.recipe, trainer.log, trainer.log.run_dir, trainer.recipe.checkpoint
    last, stop_request = recipe.trainer.max_steps, StopRequest()
    writer = CheckpointWriter(run.checkpoints, every.keep, log)
    done = start(trainer, run.checkpoints)
    for step in range(done + 1, last + 1):
        with log.step(step):
            refs = trainer.rollout(step)
            scored = trainer.score_old_policy(refs)
            minibatches = trainer.assign_advantages(refs, scored)
            sums = [trainer.update(minibatch) for minibatch in minibatches]
            trainer.reduce_metrics(sums)
            if every.export_every and step % every.export_every == 0:
                with log.time("export"):
                    trainer.export(run.export(step))
            trainer.sync()
            trainer.keep_log_ratios(step)
            if recipe.planned_evaluation and due(step, recipe.evaluation.every, last):
                trainer.evaluate(step)
        writer.check()
        stop = stop_request.is_raised(trainer, writer.seconds) and step < last
        # The last step too, so that a finished run can be extended.
        if stop or (every.every and due(step, every.every, last)):
            writer.save(trainer, step)
        if stop:
            writer.wait()
            log.say(f"stopped after step {step} as asked")
            return False
    writer.wait()
    return True


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps (0 = never), and at the last one, happens at this step."""
    return step == last or (every > 0 and step % every == 0)


def finish(trainer: Trainer) -> None:
    """Write the final weights, the plots, the page and the mark that the run is done."""
    run = trainer.log.run_dir
    trainer.reclaim_devices()
    trainer.export(run.final)
    if dist.get_rank() == 0:
        write_plot(run.path)
        write_report(run.path)
        run.done.touch()
        trainer.log.finish()


def main() -> int:
    """Entry of one trainer rank; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and GSPO_JOB_KEY are set.

    Returns:
        OK when the run is finished, STOPPED when it saved a checkpoint and stopped because it was asked to.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--controller", required=True)
    arguments = parser.parse_args()
    die_with_parent()
    trainer = open_rank(arguments.run_dir, arguments.controller)
    with trainer.log:
        if not train(trainer):
            return STOPPED
        finish(trainer)
    dist.barrier()
    return OK


def end(code: int) -> None:
    """Leave without destructors: libraries hold threads and process groups that may hang when they are destroyed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    code = FAILED
    try:
        code = main()
    except (RecipeError, CheckpointError, ControllerError, TransferError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
    except BaseException:  # leaving without destructors would swallow it
        traceback.print_exc()
    end(code)
