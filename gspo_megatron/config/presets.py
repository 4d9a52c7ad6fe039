"""Published objectives as points in the table of axes. A row other than `gspo` holds what differs from GSPO."""

from __future__ import annotations

from typing import Any

_TOKEN_CLIP = {"ratio_level": "token", "clip_low": 0.2, "clip_high": 0.2}

PRESETS: dict[str, dict[str, Any]] = {
    # 2507.18071, equations 5 to 7 and section 5.1. The number of updates a rollout batch, 4, is `batch.updates`.
    "gspo": {
        "advantage": "std",
        "advantage_ddof": 0,
        "advantage_eps": 0.0,
        "ratio_level": "sequence",
        "ratio_reference": "recomputed",
        "ratio_prefix": "none",
        "trust": "clip",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "correction": (),
        "aggregation": "seq_mean_token_mean",
        "kl": "none",
        "overlong": "none",
        "group_filter": "none",
        "replay": "off",
    },
    # The same with the ratio written at every token, for advantages that differ within a response.
    "gspo_token": {"ratio_level": "sequence_token"},
    # 2402.03300, with the band the GSPO paper tuned for it.
    "grpo": {"ratio_level": "token", "clip_low": 0.2, "clip_high": 0.27},
    # The GSPO paper's baseline on mixtures of experts.
    "grpo_replay": {"ratio_level": "token", "clip_low": 0.2, "clip_high": 0.27, "replay": "trainer"},
    # 2503.20783: no division by the length or by the spread of the rewards.
    "dr_grpo": {**_TOKEN_CLIP, "advantage": "mean", "aggregation": "constant"},
    # 2503.14476; its soft overlong penalty needs a length: set overlong=soft and overlong_buffer.
    "dapo": {**_TOKEN_CLIP, "clip_high": 0.28, "aggregation": "token_mean", "group_filter": "dynamic_sampling"},
    # 2506.13585: no token is dropped; its weight is capped.
    "cispo": {"ratio_level": "token", "trust": "detached_clip", "ratio_cap": 5.0, "aggregation": "token_mean"},
    # 2511.20347: a smooth gate in place of the clip.
    "sapo": {"ratio_level": "token", "trust": "soft_gate"},
    # 2507.20673: log-ratios are clipped per token and then averaged.
    "gmpo": {"trust": "log_clip", "clip_low": 0.4, "clip_high": 0.4},
    # 2602.05261: GSPO multiplied by the length.
    "luspo": {"clip_low": 2e-3, "clip_high": 2.5e-3, "aggregation": "seq_mean_token_sum"},
    # 2402.14740: leave-one-out baseline, the log-prob of the whole response.
    "rloo": {**_TOKEN_CLIP, "advantage": "rloo", "aggregation": "seq_mean_token_sum"},
    # 2501.03262: rewards are normalised over the whole batch; with a baseline, less the mean of their group.
    "reinforce_pp": {**_TOKEN_CLIP, "advantage": "batch", "aggregation": "token_mean"},
    "reinforce_pp_baseline": {**_TOKEN_CLIP, "advantage": "batch_std", "aggregation": "token_mean"},
    # 2601.22718: CISPO with the least ratio of the prefix as a factor. The cap is CISPO's.
    "minpro": {
        "ratio_level": "token",
        "ratio_prefix": "minimum",
        "trust": "detached_clip",
        "ratio_cap": 5.0,
        "aggregation": "token_mean",
    },
    # 2512.01374: first-order token objective; a capped weight corrects the sampler's gap.
    "minirl": {
        "ratio_level": "token",
        "trust": "mask",
        "clip_low": 0.2,
        "clip_high": 0.27,
        "advantage": "mean",
        "aggregation": "seq_mean_token_sum",
        "correction": ("tis",),
        "tis_cap": 5.0,
    },
    # 1707.06347 with the advantages of 1506.02438: a critic in place of groups.
    "ppo": {
        **_TOKEN_CLIP,
        "advantage": "gae",
        "gae_discount": 1.0,
        "gae_decay": 0.95,
        "value_clip": 0.2,
        "aggregation": "token_mean",
    },
    # 2306.13649 with reverse KL, as a policy gradient ("On-Policy Distillation", Thinking Machines 2025). Theirs is not
    # clipped, with one update a batch; PPO's band is for more of them.
    "distillation": {**_TOKEN_CLIP, "advantage": "teacher", "aggregation": "token_mean"},
}
