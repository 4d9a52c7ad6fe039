"""The device layer for machines with no GPU: megatron-core 0.19 on gloo and host memory.

megatron-core calls into `torch.cuda` unconditionally in a few dozen places. `install()` gives each of them a host
meaning, by replaced functions and never by a dispatch mode (a `TorchFunctionMode` is switched off inside
`Tensor.backward`). Nothing here runs, or is imported, where a GPU is present; the arithmetic is untouched.

Nothing outside megatron changes. What a module of megatron calls `torch` is a stand-in for the library (transformers
knows `torch.tensor` and its like by identity, and leaves a model half-initialised where somebody replaced them); the
two methods of tensors that megatron calls are replaced while one of the functions of WITH_METHODS runs.

What is replaced, and who needs it:
    torch.cuda.current_device and streams       mappings, layers, p2p communication, gradient buffers
    torch.zeros / torch.tensor, device="cuda"   schedules, optimizers, gradient clipping; pin_memory: YaRN under CP
    Tensor.type, Tensor.cuda                    optimizers and gradient clipping compare and move by name
    jit_fuser                                   torch.compile, which needs a compiler
    tensor_parallel.random rng state            the RNG tracker
    maybe_move_tensor_to_cpu(as_numpy=True)     gloo's all_to_all_single wants ints, not tensors, as split sizes
    uneven gather / reduce-scatter              gloo has neither; expert tensor parallelism needs both
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

HOST = torch.device("cpu")
WITH_METHODS = {
    "megatron.core.optimizer.optimizer": "Float16OptimizerWithFloat16Params.__init__",
    "megatron.core.optimizer.distrib_optimizer": "DistributedOptimizer.__init__",
    "megatron.core.optimizer.clip_grads": "clip_grad_by_total_norm_fp32",
    "megatron.core.models.common.embeddings.rope_utils": "get_pos_emb_on_this_cp_rank",
    "megatron.core.models.common.language_module.language_module": "LanguageModule.setup_embeddings_and_output_layer",
}
"""Module -> the function of it that calls `Tensor.type()` or `Tensor.cuda()`."""
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


class _Module(ModuleType):
    """A library with some names replaced; all others are the library's own."""

    def __init__(self, library: ModuleType, **replaced: Any) -> None:
        super().__init__(library.__name__)
        self.__dict__.update(replaced)
        self._library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = HOST
        kwargs.pop("pin_memory", None)  # a driver pins
        return factory(*args, **kwargs)

    return make


_STREAM = _HostStream()
_CUDA = _Module(
    torch.cuda,
    current_device=lambda: HOST,
    set_device=lambda _: None,
    synchronize=lambda *_: None,
    empty_cache=lambda: None,
    current_stream=lambda *_: _STREAM,
    default_stream=lambda *_: _STREAM,
    Stream=_HostStream,
    Event=_HostStream,
    stream=_in_stream,
    manual_seed=lambda _: None,
    get_rng_state=lambda *_: torch.get_rng_state(),
    set_rng_state=lambda state, *_: torch.set_rng_state(state),
    nvtx=_Module(torch.cuda.nvtx, range_push=lambda _: None, range_pop=lambda: None),
)
_TORCH = _Module(torch, cuda=_CUDA, zeros=_on_host(torch.zeros), tensor=_on_host(torch.tensor))
"""What megatron's modules call `torch`."""


@functools.cache
def install() -> None:
    """Adapt megatron's modules: those that are imported, and every other one when it is."""
    for name, module in list(sys.modules.items()):
        if _is_megatron(name):
            _adapt(module)
    sys.meta_path.insert(0, _Finder())
    _patch_megatron()


def _is_megatron(name: str) -> bool:
    return name.partition(".")[0] == "megatron"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds megatron's modules as usual and has each adapted before anybody imports a name from it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_megatron(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _adapt(module)


def _adapt(module: ModuleType) -> None:
    if vars(module).get("torch") is torch:
        vars(module)["torch"] = _TORCH
    if module.__name__ == "megatron.core.jit":
        module.disable_jit_fuser()
    if module.__name__ in WITH_METHODS:
        *owners, name = WITH_METHODS[module.__name__].split(".")
        owner = functools.reduce(getattr, owners, module)
        setattr(owner, name, _with_methods(getattr(owner, name)))


def _with_methods(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function with host meanings of the two methods, which are torch's own again when it returns."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        own = {name: vars(torch.Tensor).get(name) for name in ("type", "cuda")}
        torch.Tensor.type = _name_as_cuda(torch.Tensor.type)
        torch.Tensor.cuda = lambda self, *_, **__: self
        try:
            return function(*args, **kwargs)
        finally:
            for name, method in own.items():
                # Both are the base class's, unless a call within a call has put them here.
                delattr(torch.Tensor, name) if method is None else setattr(torch.Tensor, name, method)

    return run


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
