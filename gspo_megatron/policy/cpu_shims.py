"""The device layer for machines with no GPU: megatron-core 0.19 on gloo and host memory.

megatron-core calls into `torch.cuda` unconditionally in a few dozen places. `install()` gives each of them a host
meaning, by patched functions and never by a dispatch mode (a `TorchFunctionMode` is switched off inside
`Tensor.backward`). Nothing here runs, or is imported, where a GPU is present; the arithmetic is untouched.

What is patched, and who needs it:
    torch.cuda.current_device and streams       mappings, layers, p2p communication, gradient buffers
    torch.zeros / torch.tensor, device="cuda"   schedules, optimizers, gradient clipping; pin_memory: YaRN under CP
    Tensor.type, Tensor.cuda                    optimizers and gradient clipping compare and move by name
    tensor_parallel.random rng state            the RNG tracker
    maybe_move_tensor_to_cpu(as_numpy=True)     gloo's all_to_all_single wants ints, not tensors, as split sizes
    uneven gather / reduce-scatter              gloo has neither; expert tensor parallelism needs both
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

HOST = torch.device("cpu")
_FLOAT_NAMES = {torch.float32: "Float", torch.float64: "Double", torch.bfloat16: "BFloat16", torch.float16: "Half"}


class _HostStream:
    """Takes the place of a CUDA stream or event; host code always runs in order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record(self, _: Any = None) -> None: ...

    def record_event(self, _: Any = None) -> _HostStream:
        return self

    def wait(self, _: Any = None) -> None: ...

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def _in_stream(_: Any) -> Iterator[None]:
    yield


@functools.cache
def install() -> None:
    """Patch once, before any megatron module is imported."""
    torch._dynamo.config.disable = True  # jit_fuser is torch.compile, which needs a compiler
    _patch_torch()
    _patch_megatron()


def _patch_torch() -> None:
    stream = _HostStream()
    for name, value in {
        "current_device": lambda: HOST,
        "set_device": lambda _: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "Stream": _HostStream,
        "Event": _HostStream,
        "stream": _in_stream,
        "manual_seed": lambda _: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push = lambda _: None
    torch.cuda.nvtx.range_pop = lambda: None
    torch.zeros = _on_host(torch.zeros)
    torch.tensor = _on_host(torch.tensor)
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.Tensor.type = _name_as_cuda(torch.Tensor.type)


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = HOST
        kwargs.pop("pin_memory", None)  # a driver pins
        return factory(*args, **kwargs)

    return make


def _name_as_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    def name_or_cast(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self.dtype not in _FLOAT_NAMES:
            return original(self, *args, **kwargs)
        return f"torch.cuda.{_FLOAT_NAMES[self.dtype]}Tensor"

    return name_or_cast


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    moe_utils.maybe_move_tensor_to_cpu = _split_sizes_to_ints
    token_dispatcher.maybe_move_tensor_to_cpu = _split_sizes_to_ints
    mappings._gather_along_first_dim = _gather_uneven(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _reduce_scatter_uneven(mappings._reduce_scatter_along_first_dim)


def _split_sizes_to_ints(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _as_ints(sizes: Any) -> list[int]:
    return [int(size) for size in sizes]


def _gather_uneven(even: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def gather(
        input_: torch.Tensor, group: dist.ProcessGroup, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even(input_, group, None, use_global_buffer)
        sizes = _as_ints(output_split_sizes)
        output = input_.new_empty((sum(sizes), *input_.shape[1:]))
        copies = input_.contiguous().repeat((group.size(), *([1] * (input_.dim() - 1))))
        dist.all_to_all_single(output, copies, sizes, [len(input_)] * group.size(), group=group)
        return output

    return gather


def _reduce_scatter_uneven(even: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def reduce_scatter(
        input_: torch.Tensor, group: dist.ProcessGroup, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even(input_, group, None, use_global_buffer)
        sizes = _as_ints(input_split_sizes)
        mine = sizes[group.rank()]
        parts = input_.new_empty((mine * group.size(), *input_.shape[1:]))
        dist.all_to_all_single(parts, input_.contiguous(), [mine] * group.size(), sizes, group=group)
        return parts.view(group.size(), mine, *input_.shape[1:]).sum(0)

    return reduce_scatter
