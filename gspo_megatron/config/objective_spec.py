"""The objective of a run: a preset, and the axes that the recipe changes.

This module imports without torch, so that `gspo plan` can name the algorithm before anything is queued.
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import model_validator

from gspo_megatron.config.axes import TRUST_RULES, Axes
from gspo_megatron.config.objective_text import one_sentence
from gspo_megatron.config.plugins import load_object
from gspo_megatron.config.presets import PRESETS
from gspo_megatron.config.recipe_paths import ObjectReference

DROP_SEQUENCES = frozenset({"geometric_mask", "opsm", "trust_region_mask", "veto"})
"""Corrections that give every token of a sequence the factor 0."""
DRIFT_MASKS = frozenset({"opsm", "trust_region_mask"})
"""Corrections that compare the current policy with the sampler; the others compare the old policy with it."""


class ObjectiveSpec(Axes):
    """A value for every axis: the objective that `policy_loss` computes."""

    name: str = "gspo"
    """The preset that it is based on."""

    @classmethod
    def preset(cls, name: str) -> ObjectiveSpec:
        """Return a row of `PRESETS`, or the ObjectiveSpec at `file.py:NAME` or `package.module:NAME`.

        Raises:
            ValueError: unknown preset, or the object is not an ObjectiveSpec.
        """
        if ":" in name:
            found = load_object(name)
            if not isinstance(found, cls):
                raise ValueError(f"{name} is a {type(found).__name__}, not an ObjectiveSpec; name an ObjectiveSpec")
            return found
        if name not in PRESETS:
            close = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(PRESETS)} or file.py:NAME"
            raise ValueError(f"preset={name} is not known; {hint}")
        return cls(name=name, **PRESETS[name])

    def replace(self, **changes: Any) -> ObjectiveSpec:
        """Return a copy with some axes changed. The values are checked like those of a recipe."""
        return type(self).model_validate({**self.model_dump(), **changes})

    @property
    def per_sequence(self) -> bool:
        """Whether the ratio is one number per sequence."""
        return self.ratio_level != "token"

    @property
    def requires_every_sequence(self) -> str:
        """Why a sequence with advantage 0 may have a gradient or an effect; empty = it has none."""
        if self.has_critic:
            return "the critic learns from every token"
        if self.has_teacher:
            return "advantage=teacher gives every token its own"
        if self.kl != "none":
            return f"kl={self.kl} compares every sequence with the reference policy"
        if self.trust not in TRUST_RULES:
            return "a trust rule of your own may give a gradient where the advantage is 0"
        return ""

    @property
    def keeps_every_gradient(self) -> str:
        """Why no sequence with an advantage loses its whole gradient; empty = one may.

        Where one may, the gradient itself decides: a sequence with a token that kept its gradient goes on whole.
        """
        if self.has_critic:
            return "the critic learns from every token"
        if DROP_SEQUENCES.intersection(self.correction):
            return ""
        if self.trust not in ("clip", "dual_clip", "mask"):
            return f"trust={self.trust} takes the gradient of no whole sequence"
        if not self.per_sequence:
            return "ratio_level=token clips single tokens, and their sequences keep a gradient"
        return ""

    @property
    def requires_old_logprobs(self) -> str:
        """What reads log-probs of the old weights by the trainer; empty = only metrics do."""
        if self.has_critic:
            return "advantage=gae takes the critic's values of their pass"
        if self.has_teacher:
            return "advantage=teacher subtracts them"
        if self.ratio_reference == "recomputed":
            return "ratio_reference=recomputed divides by them"
        # Interpolated log-probs take the place of the old policy's.
        if self.ratio_reference == "sampler" and not DRIFT_MASKS.issuperset(self.correction):
            return f"correction={list(self.correction)} compares them with the sampler's"
        if self.kl != "none":
            return f"kl={self.kl} weighs by them"
        if self.replay == "trainer":
            return "replay=trainer takes the experts of their pass"
        return ""

    def describe(self, sequences: int | None = None, updates: int | None = None) -> str:
        """Describe the objective in one sentence.

        Args:
            sequences: sequences of one mini-batch over all ranks.
            updates: optimizer steps per rollout batch.
        """
        return one_sentence(self.name, self, sequences, updates)


class ObjectiveSection(Axes):
    """`objective`: a preset, and the axes that the recipe changes. A missing or null axis keeps the preset's value."""

    preset: ObjectReference = "gspo"
    """gspo, gspo_token, grpo, grpo_replay, dr_grpo, dapo, cispo, sapo, gmpo, luspo, rloo, reinforce_pp,
    reinforce_pp_baseline, minpro, minirl, ppo, distillation, or `file.py:NAME`.

    Source: the algorithm this repository is for.
    """

    @model_validator(mode="before")
    @classmethod
    def axes_come_from_the_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # An override of a text axis is the text `null`.
        changed = {key: value for key, value in values.items() if value is not None and value != "null"}
        axes = ObjectiveSpec.preset(str(changed.get("preset", "gspo"))).model_dump(exclude={"name"})
        if isinstance(changed.get("options"), dict):
            changed["options"] = {**axes["options"], **changed["options"]}
        return {**axes, **changed}

    def spec(self, max_answer_tokens: int | None = None) -> ObjectiveSpec:
        """Return the objective that this section describes.

        Args:
            max_answer_tokens: `rollout.max_answer_tokens`, the divisor of `aggregation=constant` when
                `aggregation_length` is null.
        """
        axes = self.model_dump(exclude={"preset"})
        if self.aggregation == "constant" and self.aggregation_length is None:
            axes["aggregation_length"] = max_answer_tokens
        return ObjectiveSpec(name=ObjectiveSpec.preset(self.preset).name, **axes)
