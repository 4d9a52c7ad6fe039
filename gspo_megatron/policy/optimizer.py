"""The optimizer of a policy: Megatron's Adam over its chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_megatron.models.hf_table import VALUE_HEAD
from gspo_megatron.models.megatron_engine import optimizer_arguments

CRITIC = "critic"
"""Key of an optimizer's group of parameters: whether it holds the value head."""


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """Settings of the optimizer for one phase of training."""

    lr: float
    """Peak learning rate; the phase scales it every step."""
    betas: tuple[float, float]
    """Adam's averaging constants."""
    eps: float
    """Adam's epsilon."""
    weight_decay: float
    """Decoupled weight decay of matrices; norm weights are not decayed."""
    clip_grad: float
    """Largest global gradient norm."""


def make_optimizer(
    settings: OptimizerSettings, model: TransformerConfig, chunks: Sequence[Any], distributes: bool
) -> Any:
    """A fresh optimizer over the present weights.

    Args:
        settings: of this phase.
        model: configuration of the chunks.
        chunks: in Megatron's data-parallel wrapper.
        distributes: whether the replicas share its states; the wrapper must have been built with the same value.
    """
    arguments = optimizer_arguments(settings, str(model.params_dtype).removeprefix("torch."), distributes)
    config = OptimizerConfig(**arguments | {"bf16": model.bf16, "params_dtype": model.params_dtype})
    overrides = get_standard_config_overrides(config)
    # A group of its own: it has a learning rate of its own.
    overrides[ParamKey(name=f"*{VALUE_HEAD}")] = cast("Any", {CRITIC: True})
    optimizer = get_megatron_optimizer(config, list(chunks), overrides, use_gloo_process_groups=False)
    for group in optimizer.param_groups:
        # Norm weights are not decayed; Megatron leaves the product to its own scheduler.
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    return optimizer
