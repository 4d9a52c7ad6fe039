"""Transformer Engine without a GPU: its own Python, its compiled functions answered by plain torch.

`install()` after `gspo_megatron.policy` was imported and the world was started, in the environment of SETTINGS; then
the policy is built as on a GPU. Everything is answered at the edge of the compiled module `transformer_engine_torch`,
with the arguments that it takes: what Transformer Engine and megatron compute around it is theirs. Products of bfloat16
are added up in float64, so that a row's result is the same in every batch.

Source of each meaning: the function of that name in Transformer Engine 2.20, `csrc/extensions/`.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.policy import cpu_shims

HOST = torch.device("cpu")
CAPABILITY = (9, 0)
SETTINGS = {
    "TRITON_INTERPRET": "1",
    # It would compile for a GPU.
    "TORCHDYNAMO_DISABLE": "1",
    "NVTE_MASKED_SOFTMAX_FUSION": "0",
}
"""Environment of a process that installs this, from its start."""
calls: Counter[str] = Counter()
"""How often each function was asked."""


def engine(name: str) -> Any:
    """A module of Transformer Engine, which this environment's type checker does not know."""
    return importlib.import_module(f"transformer_engine.pytorch.{name}")


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, not rounded below float32."""
    return left @ right if left.dtype is torch.float32 else left.double() @ right.double()


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, _quantizer: Any, _kind: Any, _margin: int, zero: bool
) -> list[Any]:
    """Norm of each row; [normed, None, reciprocal of the root mean square]."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1) + eps)
    normed = (wide * scale[..., None] * (weight.float() + zero)).to(x.dtype)
    return [normed if out is None else out.copy_(normed), None, scale]


def rmsnorm_bwd(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, _margin: int, zero: bool) -> tuple[Any, ...]:
    """Gradients of the rows and of the weight."""
    wide, upper = x.float() * scale[..., None], grad.float()
    inner = upper * (weight.float() + zero)
    rows = scale[..., None] * (inner - wide * (inner * wide).mean(-1, keepdim=True))
    return rows.to(x.dtype), (upper * wide).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


def operand(tensor: Tensor, turned: bool) -> Tensor:
    """A matrix of all leading dimensions, turned where asked."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat.T if turned else flat


def put(out: Tensor, value: Tensor, accumulate: bool) -> Tensor:
    """Write a product, or add it in the type of `out`."""
    value = value.to(out.dtype).view_as(out)
    return out.add_(value) if accumulate else out.copy_(value)


def generic_gemm(
    a: Tensor, turn_a: bool, b: Tensor, turn_b: bool, out: Tensor | None, _quantizer: Any, kind: Any,
    bias: Tensor | None, _bias_kind: Any, gelu: bool, _gelu_in: Any, grad: bool, _space: Any, _size: int,
    accumulate: bool, *_: Any, **__: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """op(b) @ op(a), column-major arguments as cuBLAS has them; with `grad` the bias' gradient too."""
    assert not gelu
    result = multiply(operand(b, turn_b), operand(a, turn_a))
    if not turn_b:
        result = result.view(*b.shape[:-1], -1)
    has_bias = bias is not None and bias.numel() > 0
    found = operand(b, False).float().sum(0).to(bias.dtype) if has_bias and grad and bias is not None else None
    if has_bias and not grad and bias is not None:
        result = result + bias
    if out is None:
        return result.to(_type_of(kind, b.dtype)), found, None, None
    return put(out, result, accumulate), found, None, None


def te_general_grouped_gemm(
    a: Sequence[Tensor], turn_a: bool, b: Sequence[Tensor], turn_b: bool, out: Sequence[Tensor], _kind: Any,
    _splits: Any, bias: Any, _bias_kind: Any, single: bool, _gelu: Any, _grad: bool, _space: Any, _size: int,
    accumulate: bool, *_: Any,
) -> Any:  # fmt: skip
    """`generic_gemm` of every pair; `single`: the results one below the other."""
    start = 0
    for index, (one, other) in enumerate(zip(a, b, strict=True)):
        result = multiply(operand(other, turn_b), operand(one, turn_a))
        put(out[0][start : start + len(result)] if single else out[index], result, accumulate)
        start += len(result)
    return bias


def _type_of(kind: Any, otherwise: torch.dtype) -> torch.dtype:
    names: dict[torch.dtype, Any] = engine("constants").TE_DType
    return next((dtype for dtype, name in names.items() if name == kind), otherwise)


def fused_rope_forward(
    tokens: Tensor, angles: Tensor, start: Any, _form: Any, interleaved: bool, lengths: Tensor, ranks: int, rank: int,
    sign: int = 1,
) -> Tensor:  # fmt: skip
    """Rotate each token of a pack [T, heads, d] by the angle of its place in its sequence, of [longest, 1, 1, d]."""
    assert start is None and not interleaved and lengths is not None
    own = angles.view(len(angles), -1).index_select(0, places(lengths, ranks, rank))[:, None]
    turned, kept = tokens[..., : own.shape[-1]].float(), tokens[..., own.shape[-1] :]
    first, second = turned.chunk(2, -1)
    moved = torch.cat([-second, first], -1)
    return torch.cat([(turned * own.cos() + sign * moved * own.sin()).to(tokens.dtype), kept], -1)


def fused_rope_backward(grad: Tensor, *rest: Any) -> Tensor:
    """Rotate back."""
    return fused_rope_forward(grad, *rest, sign=-1)


def places(lengths: Tensor, ranks: int, rank: int) -> Tensor:
    """[T_local] places of a rank's tokens in their sequences; context-parallel ranks hold chunks r and 2 CP - 1 - r."""
    found = []
    for begin, end in spans(lengths):
        half = (end - begin) // (2 * ranks)
        pair = (rank, 2 * ranks - 1 - rank) if ranks > 1 else (0, 1)
        found += [torch.arange(at * half, (at + 1) * half) for at in pair] if ranks > 1 else [torch.arange(end - begin)]
    return torch.cat(found)


def spans(lengths: Tensor) -> list[tuple[int, int]]:
    """(start, end) of each sequence of cumulated lengths."""
    return list(itertools.pairwise(lengths.tolist()))


def convert_thd_to_bshd(tokens: Tensor, lengths: Tensor, batch: int, longest: int) -> Tensor:
    """A pack as rows of equal length."""
    rows = tokens.new_zeros(batch, longest, *tokens.shape[1:])
    for row, (begin, end) in enumerate(spans(lengths)):
        rows[row, : end - begin] = tokens[begin:end]
    return rows


def convert_bshd_to_thd(rows: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Back."""
    tokens = rows.new_zeros(total, *rows.shape[2:])
    for row, (begin, end) in enumerate(spans(lengths)):
        tokens[begin:end] = rows[row, : end - begin]
    return tokens


def multi_tensor_l2norm(_chunk: int, _noop: Any, lists: Any, _each: bool = False) -> tuple[Tensor, Tensor]:
    """Norm of all, and of each."""
    norms = torch.stack([one.float().norm() for one in lists[0]]) if lists[0] else torch.zeros(1)
    return norms.norm().view(1), norms


def multi_tensor_scale(_chunk: int, _noop: Any, lists: Any, scale: Any) -> None:
    """second = first * scale."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    _chunk: int, _noop: Any, lists: Any, lr: float, beta1: float, beta2: float, eps: float, step: int, mode: int,
    correct: int, decay: float, *_: Any,
) -> None:  # fmt: skip
    """Adam with decoupled decay of (gradients, parameters, first, second moments)."""
    assert mode == 1
    one, two = (1 - beta1**step, 1 - beta2**step) if correct else (1.0, 1.0)
    for grad, weight, first, second in zip(*lists, strict=True):
        wide = grad.float()
        first.mul_(beta1).add_(wide, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
        move = (first / one) / ((second / two).sqrt() + eps) + decay * weight.float()
        weight.copy_(weight.float() - lr * move)


def multi_tensor_sgd(
    _chunk: int, _noop: Any, lists: Any, decay: float, momentum: float, _damp: float, lr: float, *rest: Any
) -> None:
    """Plain gradient descent of (gradients, parameters, momenta)."""
    assert not momentum
    scale = rest[-1]
    for grad, weight, *_ in zip(*lists, strict=True):
        weight.add_((grad.float() * scale + decay * weight.float()).to(weight.dtype), alpha=-lr)


ANSWERS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        rmsnorm_fwd, rmsnorm_bwd, generic_gemm, te_general_grouped_gemm, fused_rope_forward, fused_rope_backward,
        convert_thd_to_bshd, convert_bshd_to_thd, multi_tensor_l2norm, multi_tensor_scale, multi_tensor_adam,
        multi_tensor_sgd,
    )
} | {"multi_tensor_scale_tensor": multi_tensor_scale}  # fmt: skip
FACTORIES = (
    "arange", "empty", "ones", "full", "zeros", "tensor", "empty_like", "zeros_like", "ones_like", "rand", "randn",
)  # fmt: skip
HOST_MEANINGS = (
    "synchronize", "empty_cache", "current_stream", "default_stream", "Stream", "Event", "stream", "manual_seed",
    "get_rng_state", "set_rng_state",
)  # fmt: skip
"""Of torch.cuda: what the device layer has for megatron serves Transformer Engine and the policy here."""


def counted(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """The answer, and a note that it was asked."""

    def answers(*arguments: Any, **named: Any) -> Any:
        calls[name] += 1
        return answer(*arguments, **named)

    return answers


def answer(answers: dict[str, Callable[..., Any]]) -> None:
    """Put answers in the place of compiled functions, wherever a module has taken one by name."""
    compiled = importlib.import_module("transformer_engine_torch")
    taken = {id(getattr(compiled, name)): counted(name, function) for name, function in answers.items()}
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").partition(".")[0] in (
            "transformer_engine", "transformer_engine_torch", "megatron",
        ):  # fmt: skip
            for name, value in list(vars(module).items()):
                if id(value) in taken:
                    setattr(module, name, taken[id(value)])


def install() -> None:
    """Let torch, Transformer Engine and megatron see a GPU of CAPABILITY whose memory is the host's."""
    # What takes compiled functions by name must have done so: policy has imported megatron's optimizer.
    importlib.import_module("megatron.core.extensions.transformer_engine")
    from triton.runtime import autotuner

    from gspo_megatron.policy import head

    answer(ANSWERS)
    gemm, attention = engine("cpp_extensions.gemm"), engine("attention.dot_product_attention.utils")
    nothing = engine("cpp_extensions.fused_attn").FusedAttnBackend["No_Backend"]
    gemm.get_cublas_workspace = lambda _device, _overlap, grouped: [torch.empty(1)] if grouped else torch.empty(1)
    gemm.get_sm_count = lambda: 132
    # Its own choice where neither cuDNN nor flash-attention is there: attention written in torch.
    attention._get_fused_attn_backend = lambda **_: (int(nothing), "no GPU")
    autotuner.Autotuner._bench = lambda *_, **__: [0.0, 0.0, 0.0]
    head.wide_product = lambda left, right, wide: multiply(left, right).to(wide)
    _show_gpu()


def _show_gpu() -> None:
    major, minor = CAPABILITY
    device = SimpleNamespace(
        major=major, minor=minor, multi_processor_count=132, name="NVIDIA H100 80GB HBM3", total_memory=85 << 30,
        gcnArchName="",
    )  # fmt: skip
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *_: CAPABILITY
    torch.cuda.get_device_properties = lambda *_: device
    torch.cuda.is_current_stream_capturing = lambda: False
    for name in HOST_MEANINGS:
        setattr(torch.cuda, name, getattr(cpu_shims._CUDA, name))
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda _: True)
    for name in FACTORIES:
        setattr(torch, name, _on_host(getattr(torch, name)))
    move = tensor.to

    def to(self: Tensor, *arguments: Any, **named: Any) -> Tensor:
        places = [HOST if _is_cuda(one) else one for one in arguments]
        return move(self, *places, **{name: HOST if _is_cuda(one) else one for name, one in named.items()})

    tensor.to = to
    tensor.cuda = lambda self, *_, **__: self


def _is_cuda(place: Any) -> bool:
    return (isinstance(place, str) and place.startswith("cuda")) or getattr(place, "type", "") == "cuda"


def _on_host(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make(*arguments: Any, **named: Any) -> Tensor:
        if _is_cuda(named.get("device")) or named.get("device") == 0:
            named["device"] = HOST
        named.pop("pin_memory", None)
        return factory(*arguments, **named)

    return make
