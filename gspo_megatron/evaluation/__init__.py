"""The evaluator process of `gspo eval`, and what it makes of scored responses."""
