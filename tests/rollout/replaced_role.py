"""`gspo` with one role of the run started through a module of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gspo_megatron import cli
from gspo_megatron.cluster import local_backend
from gspo_megatron.commands import train_run
from gspo_megatron.config.schema import Recipe


def run_cli(arguments: Sequence[str], module: str, substitute: str) -> int:
    """Run `gspo`; every process of the run whose module is `module` runs `substitute` instead."""

    def plan_roles(recipe: Recipe, run_dir: Path, ranks: int) -> list[local_backend.Role]:
        planned = local_backend.plan_roles(recipe, run_dir, ranks)
        return [
            replace(role, command=tuple(substitute if word == module else word for word in role.command))
            for role in planned
        ]

    train_run.plan_roles = plan_roles
    return cli.main(arguments)
