"""The axes of the objective: one table, in which GSPO and its relatives are points.

What the axes compute is in `gspo_megatron/objective/`; formulas and metrics are in its README.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from gspo_megatron.config.base import Section
from gspo_megatron.config.recipe_paths import ObjectReference

TRUST_RULES = ("clip", "dual_clip", "detached_clip", "soft_gate", "mask", "log_clip", "none")
Correction = Literal["tis", "mis", "icepop", "geometric_mask", "sequence_product", "opsm", "trust_region_mask", "veto"]


class Axes(Section):
    """Every axis of the objective. The defaults are GSPO as published."""

    advantage: Literal["std", "mean", "rloo", "batch", "batch_std", "maxrl", "gae", "teacher"] = "std"
    """How rewards r of a group become advantages. `std`: (r - mean) / std. `mean`: r - mean.
    `rloo`: r - mean of the other responses. `batch`: (r - batch mean) / std of the batch, without groups.
    `batch_std`: (r - group mean) / std of the batch; both are of REINFORCE++ (arXiv 2501.03262).
    `maxrl`: (r - mean) / mean, for rewards of at least 0 (MaxRL, arXiv 2602.02710).
    `gae`: one a token, of a critic (section `critic`), (A - mean) / std over the batch (GAE, arXiv 1506.02438).
    `teacher`: one a token, log p of the teacher (section `teacher`) - log p of the old policy: on-policy distillation
    by the reverse KL divergence of each token; rewards are only measured (arXiv 2306.13649, Thinking Machines 2025).

    Source: GSPO, arXiv 2507.18071, eq. 6.
    """
    advantage_ddof: Literal[0, 1] = 0
    """Delta degrees of freedom of the standard deviation: 0 divides by n, 1 by n - 1."""
    advantage_eps: float = Field(default=0.0, ge=0)
    """Added to the standard deviation. 0 is safe: a group without variance gets advantage 0 exactly."""
    gae_discount: float = Field(default=1.0, gt=0, le=1)
    """gae: factor by which a reward counts less for each token before it. Source: usual for language models."""
    gae_decay: float = Field(default=0.95, ge=0, le=1)
    """gae: lambda. 0 trusts the critic after one token, 1 only the reward. Source: PPO, arXiv 1707.06347."""
    value_clip: float = Field(default=0.2, gt=0)
    """gae: distance from the value before the first update beyond which the critic's loss of a token has no gradient,
    unless it lies on the wrong side. Source: the implementation of PPO by OpenAI."""
    value_coefficient: float = Field(default=0.1, gt=0)
    """gae: weight of the critic's loss beside the policy's. Source: the default of TRL."""
    ratio_level: Literal["token", "sequence", "sequence_token"] = "sequence"
    """Unit of the importance ratio. `sequence` takes one advantage per response, `sequence_token` also one per token.

    Source: GSPO, eq. 7.
    """
    ratio_reference: Literal["recomputed", "sampler", "interpolated"] = "recomputed"
    """Denominator of the ratio: log-probs that the trainer recomputes with the old weights, the sampler's own, or
    between those and the current ones, by the staleness of the token (A-3PO, arXiv 2512.06547).

    Source: GSPO. The two engines' log-probs differ by more than the width of its clip band.
    """
    ratio_prefix: Literal["none", "minimum"] = "none"
    """Detached factor of a token's ratio for the tokens before it; `minimum` = the least of their ratios. Not with
    trainer.context_parallel. Source: MinPRO, arXiv 2601.22718.
    """
    trust: ObjectReference = "clip"
    """Rule that limits the ratio: clip, dual_clip, detached_clip, soft_gate, mask, log_clip, none, or
    `file.py:function`. Source: GSPO, eq. 5."""
    clip_low: float = Field(default=3e-4, ge=0)
    """Left width of the clip band: below 1 - clip_low a negative advantage gives no gradient. In nats for log_clip.

    Source: GSPO, section 5.1.
    """
    clip_high: float = Field(default=4e-4, ge=0)
    """Right width of the clip band: above 1 + clip_high a positive advantage gives no gradient. In nats for log_clip.

    Source: GSPO, section 5.1.
    """
    dual_clip_bound: float = Field(default=3.0, gt=1)
    """dual_clip: largest ratio that multiplies a negative advantage. Source: dual-clip PPO, which uses 3."""
    ratio_cap: float = Field(default=5.0, gt=0)
    """detached_clip: the largest weight of a token. Source: CISPO, MiniMax-M1, arXiv 2506.13585."""
    tau_positive: float = Field(default=1.0, gt=0)
    """soft_gate: temperature of the gate where the advantage is positive. Source: SAPO, arXiv 2511.20347."""
    tau_negative: float = Field(default=1.05, gt=0)
    """soft_gate: temperature of the gate where the advantage is negative. Source: SAPO, arXiv 2511.20347."""
    options: dict[str, float] = Field(default_factory=dict)
    """Numbers for a trust rule from `file.py:function`, which reads them as `terms.options`."""
    correction: tuple[Correction, ...] = ()
    """Detached weights that correct the gap between sampler and trainer. Several multiply; |y_i| does not change."""
    tis_cap: float = Field(default=2.0, gt=0)
    """tis, sequence_product: largest weight. Source: the value that public TIS recipes use."""
    mask_low: float | None = Field(default=None, ge=0)
    """mis, icepop: smallest weight that is kept; null = 0 for mis, 0.5 for icepop."""
    mask_high: float | None = Field(default=None, gt=0)
    """mis, icepop: largest weight that is kept; null = 2 for mis, 5 for icepop."""
    geometric_low: float = Field(default=0.99, ge=0)
    """geometric_mask: smallest geometric mean of a sequence's token weights that is kept.

    Source: chosen here. Published masks of 0.999 reject typical responses of a mixture of experts in bfloat16.
    """
    geometric_high: float = Field(default=1.01, gt=0)
    """geometric_mask: largest geometric mean of a sequence's token weights that is kept.

    Source: chosen here, as geometric_low.
    """
    opsm_delta: float = Field(default=1e-4, ge=0)
    """opsm: mean of (sampler's log-prob - current log-prob), nats per token, above which a response with a negative
    advantage is dropped. Source: the default of slime.
    """
    trust_region_delta: float = Field(default=0.5, gt=0)
    """trust_region_mask: largest (current - sampler)^2 / 2 of a token, in nats, with which its response is kept.

    Source: chosen here, a token whose probability changed by a factor of e; the mask is of arXiv 2512.23075.
    """
    veto_below: float = Field(default=1e-4, gt=0)
    """veto: a response is dropped if any of its token weights is below this value.

    Source: the strictest of the published values, 1e-4 to 1e-6.
    """
    aggregation: Literal["seq_mean_token_mean", "token_mean", "seq_mean_token_sum", "constant"] = "seq_mean_token_mean"
    """How token terms are averaged into the loss. `constant` divides their sum by sequences x aggregation_length.

    Source: GSPO, eq. 5.
    """
    aggregation_length: int | None = Field(default=None, gt=0)
    """constant: divisor of the token sum of a sequence, tokens; null = rollout.max_answer_tokens."""
    kl: Literal["none", "k1", "k2", "k3", "k3_unbiased"] = "none"
    """Estimator of the KL divergence from the reference policy; `none` = no reference pass."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL term is added: to the loss of every token, or to the reward as a sum over the response.

    Source: GRPO, arXiv 2402.03300.
    """
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the KL term."""
    overlong: Literal["none", "soft", "zero", "filter"] = "none"
    """Treatment of long responses. `soft`: a reward penalty over the last overlong_buffer tokens. `zero`: reward 0 for
    truncated responses. `filter`: truncated responses are not trained on."""
    overlong_buffer: int | None = Field(default=None, gt=0)
    """soft: tokens before the response limit over which the penalty grows from 0 to 1."""
    group_filter: Literal["none", "dynamic_sampling"] = "none"
    """dynamic_sampling: a group of equal rewards is replaced by another group."""
    replay: Literal["off", "trainer", "sampler"] = "off"
    """Routing replay: reuse the experts chosen in the old log-prob pass (trainer) or during sampling (sampler, R3)."""

    @field_validator("trust")
    @classmethod
    def trust_is_known(cls, value: str) -> str:
        if value not in TRUST_RULES and ":" not in value:
            raise ValueError(f"{value} is no trust rule; use one of {', '.join(TRUST_RULES)} or file.py:function")
        return value

    @field_validator("correction", mode="before")
    @classmethod
    def one_correction_may_stand_alone(cls, value: Any) -> Any:
        if isinstance(value, str):
            return () if value == "none" else (value,)
        return value

    @property
    def has_critic(self) -> bool:
        """Whether advantages are those of a critic, one a token, and the loss trains it."""
        return self.advantage == "gae"

    @property
    def has_teacher(self) -> bool:
        """Whether advantages are those of a teacher, one a token."""
        return self.advantage == "teacher"

    @property
    def has_token_advantages(self) -> bool:
        """Whether advantages are one a token."""
        return self.has_critic or self.has_teacher

    def mask_bounds(self, name: str) -> tuple[float, float]:
        """Return the smallest and largest weight that `mis` or `icepop` keeps: the recipe's, or the published ones."""
        low, high = (0.5, 5.0) if name == "icepop" else (0.0, 2.0)
        return (low if self.mask_low is None else self.mask_low, high if self.mask_high is None else self.mask_high)
