"""Which responses of a rollout batch are trained on, and how they are cut into mini-batches."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_megatron.config.refusal import RecipeError, refuse
from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.samples import select, split
from gspo_megatron.objective import ObjectiveSpec, is_trained
from gspo_megatron.types import SampleRef

FILTERED = "filtered"
"""Reason of what the length rule leaves out."""


def choose_trained(
    recipe: Recipe, spec: ObjectiveSpec, refs: Sequence[SampleRef]
) -> tuple[list[list[SampleRef]], dict[str, int]]:
    """Return the mini-batches of whole groups, and the number of responses left out by reason.

    A response that the length rule leaves out still counts in its group's mean. Every rank decides the same.

    Args:
        recipe: of the run.
        spec: the objective.
        refs: [N] the rollout batch, the groups one after the other.

    Raises:
        RecipeError: fewer groups are left than there are updates.
    """
    within = [ref for ref in refs if is_trained(spec, ref.stop_reason == "length")]
    kept = select(within)
    dropped = {FILTERED: len(refs) - len(within)} if len(within) < len(refs) else {}
    dropped |= kept.dropped
    groups = len({ref.prompt_index for ref in kept.refs})
    if groups < recipe.batch.updates:
        raise _too_few_groups(recipe, spec, refs, groups, dropped)
    return split(kept.refs, recipe.batch.updates), dropped


def _too_few_groups(
    recipe: Recipe, spec: ObjectiveSpec, refs: Sequence[SampleRef], groups: int, dropped: dict[str, int]
) -> RecipeError:
    others = [f"{count} {reason}" for reason, count in sorted(dropped.items()) if reason != FILTERED]
    all_groups = len({ref.prompt_index for ref in refs})
    left = f"{groups} of {all_groups} groups are left for batch.updates={recipe.batch.updates}; each needs one"
    if FILTERED not in dropped:
        message = f"{' and '.join(others) or 'none'} of {len(refs)} responses were left out, and {left}"
        fix = "lower batch.updates, or raise batch.prompts; the controller's log says why responses ended"
        return refuse("too-few-groups", "batch.updates", message, fix)
    message = f"{spec.overlong} left out {dropped[FILTERED]} of {len(refs)} responses cut at their limit"
    message += "".join(f", {other}" for other in others) + f", and {left}"
    fix = (
        f"raise rollout.max_answer_tokens={recipe.rollout.max_answer_tokens}, set objective.overlong=soft, which "
        "shortens responses and trains on all of them, or lower batch.updates"
    )
    return refuse("too-few-groups", "objective.overlong", message, fix)
