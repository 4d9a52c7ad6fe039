"""The critic: a scalar for each token from the final hidden state of the policy.

The tensor-parallel ranks share the tokens between them here, as in a norm: each computes the values of its own, and the
gradient of the weight is summed over them. So the gradient of a hidden state counts once, whatever TP is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gspo_megatron.policy import head

VALUE_HEAD = "value_head"
"""Its name as a part of the chunk that has the log-prob head."""


class ValueHead(torch.nn.Module):
    """v = w . h, in at least float32; w starts at 0, so that the first advantages are those of the reward alone."""

    def __init__(self, config: TransformerConfig, detached: bool) -> None:
        """
        Args:
            config: of the model.
            detached: whether the gradient ends here.
        """
        super().__init__()
        weight: Any = torch.nn.Parameter(torch.zeros(config.hidden_size, dtype=config.params_dtype))
        # Megatron reduces the gradients of marked parameters over the tensor-parallel ranks.
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight
        self.detached = detached

    def forward(self, hidden: Tensor, group: dist.ProcessGroup, gathers: bool) -> Tensor:
        """[T] values.

        Args:
            hidden: [T/TP, 1, H] where the ranks share the tokens, else [T, 1, H].
            group: the tensor-parallel ranks.
            gathers: whether they share the tokens.
        """
        states = hidden.detach() if self.detached else hidden
        values = _Product.apply(states[:, 0], self.weight)
        if not gathers:
            return values
        # All ranks compute the same loss: each takes its own tokens' part of the gradient, and no sum.
        whole = gather_from_sequence_parallel_region(values[:, None], tensor_parallel_output_grad=False, group=group)
        return whole[:, 0]


class _Product(torch.autograd.Function):
    """[T, H] x [H] -> [T] in at least float32, without a wide copy of the states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return head.wide_product(hidden, weight[:, None], wide)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        grad = grads[0].to(hidden.dtype)[:, None]
        grad_hidden = grad * weight if ctx.needs_input_grad[0] else None
        return grad_hidden, head.wide_product(hidden.T, grad, grads[0].dtype)[:, 0].to(weight.dtype)
