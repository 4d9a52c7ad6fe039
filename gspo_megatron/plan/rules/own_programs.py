"""Rules of what leads a conversation: whether a user's own environment or agent is one, and what it leaves unused."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.hooks import load_hook
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding


def findings(recipe: Recipe) -> Iterator[Finding]:
    """Load the environment or the agent that a recipe names and check its form."""
    environment, agent = recipe.environment, recipe.agent
    named = []
    if environment is not None and environment.is_own:
        named.append(("environment", environment.name))
    if agent is not None:
        named.append(("agent", agent.program))
    for hook, reference in named:
        try:
            load_hook(hook, reference)
        except RecipeError as error:
            yield from error.findings
    if agent is not None and recipe.tokenizer.system_prompt is not None:
        yield Finding(
            "system-prompt-unused", "warning", "tokenizer.system_prompt",
            "is not sent: an agent writes all messages itself", "remove it, and let the agent send a system message",
        )  # fmt: skip
