"""Keeps float64 float64, in transformers and in megatron alike."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class KeepDouble(TorchFunctionMode):
    """Inside, a float64 tensor is never cast to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        double = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype is torch.float64
        if double and func is torch.Tensor.float:
            return args[0]
        if double and func is torch.Tensor.to:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        if double and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
