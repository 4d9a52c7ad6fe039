"""Exponentials of log-ratios, and gradients, that stay finite whatever two sets of weights say of a token."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 340.0
"""Nats; a larger exponent counts as this one. A product of two such ratios is a float64, and each is beyond float32."""


def bounded_exp(exponent: Tensor) -> Tensor:
    """exp, at most exp(LARGEST), where value and slope stay: a factor of 0 in front of it gives a gradient of 0."""
    return _bounded(exponent).exp()


def bounded_expm1(exponent: Tensor) -> Tensor:
    """exp - 1 with the same bound."""
    return torch.expm1(_bounded(exponent))


def _bounded(exponent: Tensor) -> Tensor:
    return torch.where(exponent > LARGEST, LARGEST + (exponent - exponent.detach()), exponent)


def narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 value in another type: at most its largest number, with the gradient of the value itself."""
    largest = torch.finfo(dtype).max
    limited = value.detach().clamp(-largest, largest) + (value - value.detach())
    return torch.where(value.abs() > largest, limited, value).to(dtype)


def limit_gradient(values: Tensor, dtype: torch.dtype) -> None:
    """Keep the gradient that will reach these values within the numbers of the type that it is narrowed to."""
    largest = torch.finfo(dtype).max
    if values.requires_grad:
        values.register_hook(lambda gradient: gradient.clamp(-largest, largest))
