"""What metrics are called on the pages, in the terminal and in comparisons."""

from __future__ import annotations

NAMES = {
    "eval/accuracy": "held-out accuracy", "reward_mean": "reward", "answer_length": "response length",
    "truncated": "truncated", "clip_fraction_sequences": "clipped sequences", "clip_fraction_tokens": "clipped tokens",
    "log_s_p01": "log s, 1 %", "log_s_p99": "log s, 99 %", "grad_norm": "gradient norm", "token_entropy": "entropy",
    "mismatch_k3": "mismatch k3", "experts/load_max_over_mean": "busiest expert",
    "experts/changed": "changed expert choices", "staleness_mean": "staleness",
    "canary_largest": "canary, largest", "idle/trainers": "idle share of trainers",
    "tokens_per_second": "trained tokens a second", "seconds/step": "seconds a step",
}  # fmt: skip
"""Names by metric."""
