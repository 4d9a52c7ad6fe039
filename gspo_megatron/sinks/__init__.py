"""Metric sinks: W&B, MLflow, trackio, or a user's own, beside metrics.jsonl and TensorBoard."""
