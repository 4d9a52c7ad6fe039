"""The training loop. Every trainer rank runs it.

python -m gspo_megatron.trainer.loop --run-dir DIR --controller URL
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from gspo_megatron.cluster.child_processes import die_with_parent
from gspo_megatron.cluster.exit_codes import STOPPED
from gspo_megatron.cluster.machines import takes_turns
from gspo_megatron.cluster.watchdog import Watchdog
from gspo_megatron.config import RecipeError
from gspo_megatron.models import load_resolved
from gspo_megatron.policy import mesh
from gspo_megatron.policy.policy import Policy
from gspo_megatron.policy.specs import describe_parts
from gspo_megatron.report.page import write_report
from gspo_megatron.report.plots import write_plot
from gspo_megatron.run_log import RunLog
from gspo_megatron.trainer.checkpoint import CheckpointError, CheckpointWriter
from gspo_megatron.trainer.preemption import StopRequest
from gspo_megatron.trainer.start import start
from gspo_megatron.trainer.step import Trainer
from gspo_megatron.transport.controller_client import ControllerClient, ControllerError
from gspo_megatron.transport.weights.wire import TransferError


def train(trainer: Trainer, checkpoints: Path) -> bool:
    """Reinforcement learning: one rollout batch, `batch.updates` optimizer steps, new weights for the servers.

    Returns:
        Whether all steps are done; False when the run was asked to stop and saved itself.
    """
    recipe, log, every = trainer.recipe, trainer.log, trainer.recipe.checkpoint
    last, asked, writer = recipe.trainer.max_steps, StopRequest(), CheckpointWriter(checkpoints, every.keep, log)
    done = start(trainer, checkpoints)
    for step in range(done + 1, last + 1):
        with log.step(step):
            refs = trainer.rollout(step)
            minibatches = trainer.weigh(refs, trainer.prepare(refs))
            sums = [trainer.update(minibatch) for minibatch in minibatches]
            trainer.reduce_metrics(sums)
            if every.export_every and step % every.export_every == 0:
                with log.time("export"):
                    trainer.policy.save(checkpoints / f"hugging_face_{step:06d}")
            trainer.sync()
            if recipe.evaluation.problems and due(step, recipe.evaluation.every, last):
                trainer.evaluate(step)
        writer.check()
        stop = asked.is_raised(trainer, writer.seconds) and step < last
        if stop or (every.every and step % every.every == 0):
            writer.save(trainer, step)
        if stop:
            writer.wait()
            log.say(f"stopped after step {step} as asked; the same command goes on from there")
            return False
    writer.wait()
    return True


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last, happens now."""
    return step == last or (every > 0 and step % every == 0)


def main() -> int:
    """Entry of one trainer rank; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and GSPO_JOB_KEY are set.

    Returns:
        0 when the run is finished, STOPPED when it saved itself because it was asked to stop.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--controller", required=True)
    arguments = parser.parse_args()
    die_with_parent()
    recipe = load_resolved(arguments.run_dir / "recipe.resolved.yaml")
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    controller: ControllerClient | None = ControllerClient(arguments.controller, os.environ["GSPO_JOB_KEY"])
    if torch.cuda.is_available() and takes_turns(recipe):
        # While it starts, a server takes whatever else happens on its GPU for a part of itself; then it sleeps.
        controller.wait_ready(recipe.rollout.start_timeout)
    device = mesh.start_world()
    first = dist.get_rank() == 0
    controller = controller if first else None
    log = RunLog(arguments.run_dir, owns_terminal=first)
    Watchdog(arguments.run_dir, dist.get_rank(), dist.get_world_size(), log.pulse).start()
    policy = Policy(recipe, device)
    log.say(f"policy: {describe_parts()}")
    trainer = Trainer(recipe, arguments.run_dir, policy, controller, log)
    checkpoints = arguments.run_dir / "checkpoints"
    with log:
        if not train(trainer, checkpoints):
            return STOPPED
        trainer.take_over()
        policy.save(checkpoints / "final")
        if first:
            write_plot(arguments.run_dir)
            write_report(arguments.run_dir)
            (arguments.run_dir / "DONE").touch()
            log.finish(arguments.run_dir)
    dist.barrier()
    return 0


def end(code: int) -> None:
    """Leave without destructors: libraries hold threads and process groups whose end may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except (RecipeError, CheckpointError, ControllerError, TransferError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
    except BaseException:  # leaving without destructors would swallow it
        traceback.print_exc()
    end(code)
