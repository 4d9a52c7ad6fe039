"""Rule of the reward: whether a user's own is one."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.hooks import load_hook
from gspo_megatron.config.judge_section import PARAMETER, asks_judge
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding


def findings(recipe: Recipe, runs_here: bool) -> Iterator[Finding]:
    """Load the reward that a recipe names, and check its form and its judge.

    Args:
        recipe: names the reward.
        runs_here: whether it would be scored in this environment.
    """
    section = recipe.reward
    if not section.is_own:
        return
    try:
        found = load_hook("reward", section.name)
    except RecipeError as error:
        yield from error.findings
        return
    if asks_judge(found) != (section.judge is not None):
        message, fix = (
            (f"{section.name} has no parameter `{PARAMETER}`: nothing would ask the judge", "remove reward.judge")
            if section.judge
            else (f"{section.name} asks a judge, and none is named", "set reward.judge.url and reward.judge.model")
        )
        yield Finding("judge-mismatch", "error", "reward.judge", message, fix)
    elif section.judge and section.judge.read_key() is None:
        name = section.judge.key_variable
        yield Finding(
            "judge-key-missing", "error" if runs_here else "warning", "reward.judge.key_variable",
            f"the environment variable {name} is not set here", f"export {name}=... before the run is started",
        )  # fmt: skip
