"""Rules of advantages that are one a token: a critic's (PPO) and a teacher's (on-policy distillation)."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding


def axis_findings(spec: ObjectiveSpec) -> Iterator[Finding]:
    """Check the objective alone."""
    if not spec.has_token_advantages:
        return
    who, preset = ("critic", "ppo") if spec.has_critic else ("teacher", "distillation")
    if spec.ratio_level == "sequence":
        yield Finding(
            f"{who}-with-sequence-ratio", "error", "objective.advantage",
            f"{spec.advantage} gives one advantage a token, and ratio_level=sequence takes one a response",
            f"use ratio_level=token ({preset}) or sequence_token (gspo_token)",
        )  # fmt: skip
    if "opsm" in spec.correction:
        yield Finding(
            f"{who}-with-opsm", "error", "objective.correction",
            f"opsm drops a response by the sign of its advantage, and advantage={spec.advantage} gives one a token",
            "use veto, geometric_mask or trust_region_mask",
        )  # fmt: skip
    if spec.has_teacher:
        yield from _rewards_unread(spec)


def _rewards_unread(spec: ObjectiveSpec) -> Iterator[Finding]:
    """What acts on rewards, which a teacher's advantages do not come from."""
    acting = {
        "overlong": (spec.overlong in ("soft", "zero"), "lowers the rewards of long responses", "none or filter"),
        "group_filter": (spec.group_filter != "none", "replaces groups of equal rewards", "none"),
        "kl_in": (spec.kl != "none" and spec.kl_in == "reward", "takes the divergence from the reward", "loss"),
    }
    for key, (is_set, effect, instead) in acting.items():
        if is_set:
            yield Finding(
                "teacher-reads-no-reward", "error", f"objective.{key}",
                f"{getattr(spec, key)} {effect}, and advantage=teacher is not made of rewards",
                f"set objective.{key}={instead}",
            )  # fmt: skip


def findings(recipe: Recipe, runs_here: bool) -> Iterator[Finding]:
    """Check the objective together with the section `teacher`.

    Args:
        recipe: of the run.
        runs_here: whether it would run in this environment.
    """
    section, objective = recipe.teacher, recipe.objective
    if section is None:
        if objective.has_teacher:
            yield Finding(
                "teacher-missing", "error", "teacher.url",
                "objective.advantage=teacher, and no teacher is named",
                "set teacher.url and teacher.model: a vLLM server of yours that serves a model of the same vocabulary",
            )  # fmt: skip
        return
    if not objective.has_teacher:
        yield Finding(
            "teacher-inert", "error", "teacher.url",
            f"objective.advantage={objective.advantage} asks no teacher",
            "remove the section teacher, or set objective.preset=distillation",
        )  # fmt: skip
        return
    if section.read_key() is None:
        name = section.key_variable
        yield Finding(
            "teacher-key-missing", "error" if runs_here else "warning", "teacher.key_variable",
            f"the environment variable {name} is not set here", f"export {name}=... before the run is started",
        )  # fmt: skip
    if recipe.rollout.temperature != 1:
        yield Finding(
            "teacher-at-temperature-1", "warning", "rollout.temperature",
            f"{recipe.rollout.temperature:g}: vLLM gives the teacher's log-probs at temperature 1, so the policy at "
            "this temperature learns to be the teacher at 1",
            "set it to 1",
        )  # fmt: skip
