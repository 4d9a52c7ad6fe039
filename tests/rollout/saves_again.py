"""`gspo` whose trainers save again at once what they restored: `python -m tests.rollout.saves_again train ...`.

What was restored and what was saved can then be held against each other, before anything moves on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gspo_megatron import cli
from gspo_megatron.cluster import local_backend
from gspo_megatron.config.schema import Recipe

AGAIN = "again"
"""Directory of the run directory with the second save."""
LOOP, HERE = "gspo_megatron.trainer.loop", "tests.rollout.saves_again"


def plan_roles(recipe: Recipe, run_dir: Path, ranks: int) -> list[local_backend.Role]:
    """The roles of the run, trainers started through this file."""
    planned = local_backend.plan_roles(recipe, run_dir, ranks)
    return [replace(role, command=tuple(HERE if word == LOOP else word for word in role.command)) for role in planned]


def become_trainer() -> None:
    """Run the loop with a `load` that saves; never returns."""
    import torch

    from gspo_megatron.trainer import loop, start
    from gspo_megatron.trainer.checkpoint import CheckpointWriter
    from gspo_megatron.trainer.step import Trainer

    load = start.load

    def load_and_save(trainer: Trainer, checkpoint: Path) -> int:
        torch.manual_seed(4242)  # what a fresh process has must not pass for what was restored
        done = load(trainer, checkpoint)
        writer = CheckpointWriter(checkpoint.parents[1] / AGAIN, 1, trainer.log)
        writer.save(trainer, done)
        writer.wait()
        return done

    start.load = load_and_save
    code = 1
    try:
        code = loop.main()
    finally:
        loop.end(code)


def main(arguments: Sequence[str]) -> int:
    """`gspo` itself; what it starts comes by here again."""
    if arguments[0] == "train":
        cli.plan_roles = plan_roles
        return cli.main(arguments)
    become_trainer()
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
