"""What the loss reads and returns, and the checks of it.

Shapes: T tokens packed into one micro-batch, S sequences in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec

TOKEN_TENSORS = ("logprobs", "old_logprobs", "rollout_logprobs", "reference_logprobs", "staleness",
                 "values", "old_values", "returns")  # fmt: skip
"""Fields of `LossInputs` that are [T] numbers, or None."""


@dataclass(frozen=True, slots=True)
class BatchTotals:
    """Denominators of one mini-batch, over all ranks and micro-batches; known before the first forward."""

    sequences: int
    """Sequences with at least one trained token, those of zero advantage included."""
    tokens: int
    """Trained tokens."""


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One packed micro-batch, or this context-parallel rank's part of it."""

    logprobs: Tensor
    """[T] fp32 or fp64: log-probs of the sampled tokens under the weights in training; requires grad."""
    old_logprobs: Tensor | None
    """[T] under the weights at the start of the rollout batch; None where only metrics would read them."""
    advantages: Tensor
    """[S] one a sequence, or [T] one a token."""
    loss_mask: Tensor
    """[T] bool: True on trained tokens; the stop token yes; prompt, tool output and padding no."""
    cu_seqlens: Tensor
    """[S+1] int: where each sequence starts in T; the first is 0, the last is T."""
    totals: BatchTotals
    """Denominators of the mini-batch."""
    rollout_logprobs: Tensor | None = None
    """[T] what the sampler reported."""
    reference_logprobs: Tensor | None = None
    """[T] under the reference policy of the KL axis."""
    staleness: Tensor | None = None
    """[T] fp32 or fp64: weight versions between the token and the batch, for ratio_reference=interpolated."""
    values: Tensor | None = None
    """[T] fp32 or fp64: the critic's, of the state before each token, for advantage=gae; requires grad."""
    old_values: Tensor | None = None
    """[T] the critic's under the weights at the start of the rollout batch."""
    returns: Tensor | None = None
    """[T] what the critic learns: `old_values` + advantage, before that was normalised."""
    token_advantages: bool | None = None
    """Whether `advantages` is one a token; None = decided by its shape, and [S] where S == T."""

    @property
    def advantages_per_token(self) -> bool:
        """Whether `advantages` is [T]."""
        if self.token_advantages is not None:
            return self.token_advantages
        return self.advantages.numel() != self.cu_seqlens.numel() - 1


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The result of one micro-batch."""

    loss: Tensor
    """Scalar, to be minimised: this rank's share. Shares of all ranks and micro-batches add up to the loss."""
    metrics: dict[str, Tensor]
    """Detached float64 sums to be added over ranks and micro-batches; names that end in `/max` take the maximum."""
    clipped: Tensor
    """[2, S] float64: this rank's part of each sequence's share of tokens that lost their gradient, left and right."""


def check_shapes(spec: ObjectiveSpec, inputs: LossInputs) -> None:
    """Refuse what does not fit together. Reads shapes and types only, so it costs no synchronisation."""
    num_tokens = inputs.logprobs.numel()
    num_sequences = inputs.cu_seqlens.numel() - 1
    for name, tensor in _token_tensors(inputs):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name} {list(tensor.shape)} is {tensor.dtype}: its rounding is as wide as the clip band; "
                "compute log-probs in float32 or float64"
            )
        if tensor.shape != (num_tokens,):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [T] = [{num_tokens}] as in logprobs")
    if inputs.loss_mask.dtype != torch.bool or inputs.loss_mask.shape != (num_tokens,):
        raise ValueError(
            f"loss_mask is {inputs.loss_mask.dtype} {list(inputs.loss_mask.shape)}, expected bool [T] = [{num_tokens}]"
        )
    cu_seqlens = inputs.cu_seqlens
    if cu_seqlens.dim() != 1 or num_sequences < 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}, expected int32 or int64 [S+1]")
    if num_sequences == 0 and num_tokens:
        raise ValueError(f"cu_seqlens [1] holds no sequence but logprobs holds {num_tokens} tokens; it must end at T")
    _check_advantages(spec, inputs, num_tokens, num_sequences)
    _check_presence(spec, inputs)


def check_values(inputs: LossInputs) -> None:
    """Refuse values that cannot be. Reads them, so it synchronises on a GPU: `policy_loss` calls it on CPU only.

    Raises:
        ValueError: names the tensor, its shape and the first offending index.
    """
    cu_seqlens, num_tokens = inputs.cu_seqlens, inputs.logprobs.numel()
    shape = list(cu_seqlens.shape)
    if int(cu_seqlens[0]) != 0:
        raise ValueError(f"cu_seqlens {shape} must start at 0, but holds {int(cu_seqlens[0])} at index 0")
    falls = torch.nonzero(cu_seqlens.diff() < 0)
    if falls.numel():
        at = int(falls[0]) + 1
        fall = f"{int(cu_seqlens[at - 1])} to {int(cu_seqlens[at])}"
        raise ValueError(f"cu_seqlens {shape} must not fall, but goes from {fall} at index {at}")
    if int(cu_seqlens[-1]) != num_tokens:
        raise ValueError(
            f"cu_seqlens {shape} must cover T = {num_tokens} tokens, but ends at {int(cu_seqlens[-1])} "
            f"at index {cu_seqlens.numel() - 1}"
        )
    for name, tensor in _token_tensors(inputs):
        _check_finite(name, tensor, inputs.loss_mask, "trained position")
    if inputs.advantages_per_token:
        _check_finite("advantages", inputs.advantages, inputs.loss_mask, "trained position")
    else:
        starts = torch.cat([inputs.loss_mask.new_zeros(1, dtype=torch.int64), inputs.loss_mask.cumsum(0)])
        trained = starts[cu_seqlens[1:].long()] > starts[cu_seqlens[:-1].long()]
        _check_finite("advantages", inputs.advantages, trained, "sequence")


def _token_tensors(inputs: LossInputs) -> Iterator[tuple[str, Tensor]]:
    for name in TOKEN_TENSORS:
        tensor = getattr(inputs, name)
        if tensor is not None:
            yield name, tensor


def _check_advantages(spec: ObjectiveSpec, inputs: LossInputs, num_tokens: int, num_sequences: int) -> None:
    shape = tuple(inputs.advantages.shape)
    if not inputs.advantages.is_floating_point():
        raise TypeError(f"advantages {list(shape)} is {inputs.advantages.dtype}, expected floating point")
    if shape not in ((num_sequences,), (num_tokens,)):
        expected = f"[S] = [{num_sequences}] or [T] = [{num_tokens}]"
        raise ValueError(f"advantages has shape {list(shape)}, expected {expected}")
    if inputs.advantages_per_token and spec.ratio_level == "sequence":
        raise ValueError(
            f"advantages {list(shape)} is one a token, but ratio_level=sequence takes one a sequence; "
            "use ratio_level=sequence_token (preset gspo_token)"
        )
    if spec.has_token_advantages and not inputs.advantages_per_token:
        named = f"advantage={spec.advantage}"
        raise ValueError(f"advantages {list(shape)} is one a sequence, but {named} takes one a token")


def _check_presence(spec: ObjectiveSpec, inputs: LossInputs) -> None:
    if inputs.rollout_logprobs is None:
        if spec.ratio_reference != "recomputed":
            named = f"ratio_reference={spec.ratio_reference}"
            raise ValueError(f"rollout_logprobs is None, but {named} divides by them; pass them")
        if spec.correction:
            raise ValueError(f"rollout_logprobs is None, but correction={list(spec.correction)} reads them; pass them")
    if inputs.staleness is None and spec.ratio_reference == "interpolated":
        raise ValueError("staleness is None, but ratio_reference=interpolated weighs by it; pass it")
    missing = [name for name in ("values", "old_values", "returns") if getattr(inputs, name) is None]
    if spec.has_critic and missing:
        raise ValueError(f"{', '.join(missing)} is None, but advantage=gae trains a critic; pass them")
    if inputs.old_logprobs is None and spec.requires_old_logprobs:
        raise ValueError(f"old_logprobs is None, but {spec.requires_old_logprobs}; pass them")
    if inputs.reference_logprobs is None and spec.kl != "none" and spec.kl_in == "loss":
        raise ValueError(f"reference_logprobs is None, but kl={spec.kl} in the loss reads them; pass them")
    if spec.aggregation == "constant" and spec.aggregation_length is None:
        raise ValueError("aggregation=constant has no aggregation_length; set it, e.g. to rollout.max_answer_tokens")


def _check_finite(name: str, tensor: Tensor, where: Tensor, place: str) -> None:
    bad = torch.nonzero(~torch.isfinite(tensor.detach()) & where)
    if bad.numel():
        at = int(bad[0])
        raise ValueError(f"{name} {list(tensor.shape)} is {float(tensor[at])} at {place} {at}; it must be finite there")
