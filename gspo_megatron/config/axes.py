"""The axes of the objective: one table, in which GSPO and its relatives are points.

What the axes compute is in `gspo_megatron/objective/`; formulas and metrics are in its README.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from gspo_megatron.config.base import Section

TRUST_RULES = ("clip", "dual_clip", "detached_clip", "soft_gate", "mask", "log_clip", "none")
Correction = Literal["tis", "mis", "icepop", "geometric_mask", "sequence_product", "opsm", "veto"]


class Axes(Section):
    """Every axis of the objective; the defaults are GSPO as published."""

    advantage: Literal["std", "mean", "rloo", "batch_std"] = "std"
    """Within a group: (r - mean)/std; r - mean; r - mean of the others; (r - group mean)/std of the batch.

    Source: GSPO, arXiv 2507.18071, eq. 6.
    """
    advantage_ddof: Literal[0, 1] = 0
    """Degrees of freedom taken off in the standard deviation."""
    advantage_eps: float = Field(default=0.0, ge=0)
    """Added to the standard deviation. 0 is safe: a group without variance gets exactly 0."""
    ratio_level: Literal["token", "sequence", "sequence_token"] = "sequence"
    """Unit of the importance ratio; `sequence` takes one advantage an answer, `sequence_token` also one a token.

    Source: GSPO, eq. 7.
    """
    ratio_reference: Literal["recomputed", "sampler"] = "recomputed"
    """Denominator of the ratio: the trainer's own log-probs of the old weights, or what the sampler reported.

    Source: GSPO; the sampler's log-probs differ by more than its band is wide.
    """
    trust: str = "clip"
    """How far the ratio may carry: a name of TRUST_RULES, or `file.py:function` of your own. Source: GSPO, eq. 5."""
    clip_low: float = Field(default=3e-4, ge=0)
    """Left width of the band: ratios below 1 - clip_low stop a negative advantage. Nats for log_clip.

    Source: GSPO, section 5.1.
    """
    clip_high: float = Field(default=4e-4, ge=0)
    """Right width of the band: ratios above 1 + clip_high stop a positive advantage. Nats for log_clip.

    Source: GSPO, section 5.1.
    """
    dual_clip_bound: float = Field(default=3.0, gt=1)
    """dual_clip: a negative advantage counts at most this many times. Source: dual-clip PPO, which takes 3."""
    ratio_cap: float = Field(default=5.0, gt=0)
    """detached_clip: the largest weight of a token. Source: CISPO, MiniMax-M1, arXiv 2506.13585."""
    tau_positive: float = Field(default=1.0, gt=0)
    """soft_gate: temperature of the gate where the advantage is positive. Source: SAPO, arXiv 2511.20347."""
    tau_negative: float = Field(default=1.05, gt=0)
    """soft_gate: temperature of the gate where the advantage is negative. Source: SAPO, arXiv 2511.20347."""
    options: dict[str, float] = Field(default_factory=dict)
    """Numbers for a trust rule of your own, read there as `terms.options`."""
    correction: tuple[Correction, ...] = ()
    """Detached factors for the gap between sampler and trainer; several multiply. They never change |y_i|."""
    tis_cap: float = Field(default=2.0, gt=0)
    """tis, sequence_product: largest weight. Source: the value that public TIS recipes agree on."""
    mask_low: float | None = Field(default=None, ge=0)
    """mis, icepop: smallest weight kept; null = 0 and 0.5."""
    mask_high: float | None = Field(default=None, gt=0)
    """mis, icepop: largest weight kept; null = 2 and 5."""
    geometric_low: float = Field(default=0.99, ge=0)
    """geometric_mask: smallest geometric mean of the weights of a sequence that is kept.

    Source: ours; published masks of 0.999 reject typical answers of a mixture of experts in bf16.
    """
    geometric_high: float = Field(default=1.01, gt=0)
    """geometric_mask: largest one kept.

    Source: ours; published masks of 0.999 reject typical answers of a mixture of experts in bf16.
    """
    opsm_delta: float = Field(default=1e-4, ge=0)
    """opsm: negative answers are dropped above this mean of (sampler's log-prob - current log-prob), nats a token.

    Source: the value that slime ships.
    """
    veto_below: float = Field(default=1e-4, gt=0)
    """veto: an answer with any token weight below it is dropped.

    Source: the strictest of the published values, 1e-4 to 1e-6.
    """
    aggregation: Literal["seq_mean_token_mean", "token_mean", "seq_mean_token_sum", "constant"] = "seq_mean_token_mean"
    """How token terms become one number; `constant` divides the token sum by sequences x aggregation_length.

    Source: GSPO, eq. 5.
    """
    aggregation_length: int | None = Field(default=None, gt=0)
    """constant: tokens; null = rollout.max_answer_tokens."""
    kl: Literal["none", "k1", "k2", "k3", "k3_unbiased"] = "none"
    """Estimator of the divergence from the reference policy."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the divergence is charged: in the loss at every token, or in the reward as a sum over the answer.

    Source: where GRPO puts it, arXiv 2402.03300.
    """
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the divergence."""
    overlong: Literal["none", "soft", "zero", "filter"] = "none"
    """Long answers: soft = a penalty over the last tokens; truncated ones get reward 0, or are not trained on."""
    overlong_buffer: int | None = Field(default=None, gt=0)
    """soft: tokens before the answer limit over which the penalty grows from 0 to 1."""
    group_filter: Literal["none", "dynamic_sampling"] = "none"
    """dynamic_sampling: groups whose rewards are all equal are replaced by others."""
    replay: Literal["off", "trainer", "sampler"] = "off"
    """Experts are chosen again as recorded in the old log-prob forward (trainer) or while sampling (sampler)."""

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

    def mask_bounds(self, name: str) -> tuple[float, float]:
        """Weights that the token mask `mis` or `icepop` keeps: what the recipe says, or the published bounds."""
        low, high = (0.5, 5.0) if name == "icepop" else (0.0, 2.0)
        return (low if self.mask_low is None else self.mask_low, high if self.mask_high is None else self.mask_high)
