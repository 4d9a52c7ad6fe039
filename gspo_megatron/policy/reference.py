"""The reference policy of the KL term: its weights are kept on the host and replace the policy's during one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class ReferenceWeights:
    """A copy of this rank's present weights on the host; exchanged with the policy's for a pass."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._waiting = [_to_host(parameter) for parameter in self._parameters]

    @property
    def num_bytes(self) -> int:
        """Host memory of this rank."""
        return sum(tensor.nbytes for tensor in self._waiting)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the policy has the reference's weights; afterwards its own again, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for index, parameter in enumerate(self._parameters):
                leaving = _to_host(parameter)
                parameter.copy_(self._waiting[index])
                self._waiting[index] = leaving


def _to_host(parameter: Tensor) -> Tensor:
    host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
    return host.copy_(parameter.detach())
