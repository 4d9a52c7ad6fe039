"""Figures of `placement.device` that a data sheet gives twice: with sparsity, and for both directions of a link."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.cluster.machines import DEVICES
from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding

SAME = 0.15
"""Difference of two memory bandwidths up to which they are of the same GPU, or of one of its generation."""
ROUNDED = 0.02
"""Difference of a figure from twice another one that rounding explains."""


def findings(recipe: Recipe) -> Iterator[Finding]:
    """Warn of a figure that is twice the one which counts here. The GPU is known by its memory bandwidth."""
    device = recipe.placement.device
    if device is None:
        return
    named = set()
    for kind, known in DEVICES.items():
        if abs(device.memory_bandwidth * 1e9 / known.bandwidth - 1) > SAME:
            continue
        for key, value, single, what in (
            ("flops", device.flops, known.matmul / 1e12, "TFLOP/s with sparsity; dense products count"),
            ("link", device.link, known.node_link / 1e9, "GB/s in both directions together; one way counts"),
        ):
            if key not in named and abs(value / (2 * single) - 1) < ROUNDED:
                named.add(key)
                yield Finding(
                    f"doubled-{key}", "warning", f"placement.device.{key}",
                    f"{value:g} is twice the {single:g} of {kind.upper()}: {what}", f"set it to {value / 2:g}",
                )  # fmt: skip
