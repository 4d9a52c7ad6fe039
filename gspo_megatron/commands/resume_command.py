"""What to type to go on with a run, and to train a finished one further."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import gspo_megatron
from gspo_megatron.config.recipe_paths import short_path

ROLLOUT_PYTHON = "GSPO_ROLLOUT_PYTHON"
"""Set by `launch/local.sh`, which then is the command."""


def resume_command(recipe: Path, overrides: Sequence[str], run_dir: Path) -> str:
    """The command that was typed, with the run directory named once."""
    kept = [word for word in overrides if not word.startswith("run.directory=")]
    return shlex.join([*_program(), str(recipe), *kept, f"run.directory={short_path(run_dir)}"])


def extend_command(recipe: Path, overrides: Sequence[str], run_dir: Path, steps: int) -> str:
    """The same with twice the steps."""
    kept = [word for word in overrides if not word.startswith("trainer.max_steps=")]
    return resume_command(recipe, [*kept, f"trainer.max_steps={2 * steps}"], run_dir)


def _program() -> list[str]:
    called = Path(sys.argv[0])
    if called.name == "gspo":
        return [sys.argv[0], "train"]
    if ROLLOUT_PYTHON in os.environ:
        return [str(Path(gspo_megatron.__file__).parent.parent / "launch" / "local.sh")]
    return [sys.executable, "-m", "gspo_megatron.cli", "train"]
