"""The trainer's end of a weight update: every rank sends the slices that the plan gives it. Imports no vllm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.controller_client import ControllerClient
from gspo_megatron.transport.weights.checksum import MASK, Checksum, plane
from gspo_megatron.transport.weights.ipc import device_name, open_send_channel
from gspo_megatron.transport.weights.plan import Message, Slice
from gspo_megatron.transport.weights.wire import SendChannel, TransferError, UpdateTicket

BROKEN = "the weight update broke between the trainer and the servers"
ATTEMPTS = 3
"""Transfers of one update: a server that is lost on the way costs another one, without it."""


def first_cause(faults: Sequence[str]) -> str:
    """Of what the ranks say, what is no consequence of another's: an end of a connection has a reason elsewhere."""
    return min(faults, key=lambda fault: fault.startswith(BROKEN), default="")


class WeightSender:
    """One trainer rank's end; kept for the whole run, so that an unchanged set of servers keeps its connections."""

    def __init__(self, device: torch.device, *, shares: bool) -> None:
        """Take this rank's device, and whether servers share the trainer's devices."""
        self.device, self._shares = device, shares
        self._channel: SendChannel | None = None

    def update(
        self,
        controller: ControllerClient | None,
        version: int,
        arch: Architecture,
        layout: Layout,
        parameters: Mapping[str, Tensor],
    ) -> list[int]:
        """Bring a version to all servers that are in use; a collective over the trainer ranks.

        Args:
            link: the controller; on trainer rank 0 only.
            version: of the weights.
            arch: the model.
            layout: of the trainer ranks.
            parameters: this rank's parameters under their global Megatron names.

        Returns:
            [workers] what each must have received, for `ControllerClient.finish_update`.

        Raises:
            TransferError: it broke again and again, though the controller took out every server that did not answer.
        """
        dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
        fault = ""
        devices = self._devices()
        for _ in range(ATTEMPTS):
            received = [
                controller.begin_update(version, arch, dtype, layout, devices) if controller is not None else None
            ]
            dist.broadcast_object_list(received, src=0)
            assert received[0] is not None
            mine: list[int] | str
            try:
                mine = self.send(received[0], dist.get_rank(), parameters)
            except TransferError as error:
                mine = str(error)
            sums: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(sums, mine)
            fault = first_cause([entry for entry in sums if isinstance(entry, str)])
            if not fault:
                return [sum(column) & MASK for column in zip(*sums, strict=True)]
            self.close()
        raise TransferError(fault)

    def send(self, ticket: dict[str, Any], rank: int, parameters: Mapping[str, Tensor]) -> list[int]:
        """Send this rank's slices to the workers; all trainer ranks do so at the same time.

        Args:
            ticket: the answer of `ControllerClient.begin_update`, the same on every rank.
            rank: this trainer rank.
            parameters: this rank's parameters under their global Megatron names.

        Returns:
            [workers] checksum of what went to each worker; over all ranks they add up, modulo 2**64, to what the worker
            must hold.

        Raises:
            TransferError: a server was lost, or a parameter is not what the plan says.
        """
        terms = UpdateTicket(**ticket)
        try:
            if self._channel is None or self._channel.name != terms.group:
                self.close()
                self._channel = open_send_channel(terms, self.device, rank)
            return _send(self._channel, parameters)
        except TransferError:
            self.close()
            raise
        except RuntimeError as error:
            self.close()
            reason = str(error).splitlines()[0]
            raise TransferError(f"{BROKEN}: {reason}") from error

    def close(self) -> None:
        """Leave the group; a server that still waits sees the connection close and fails its update."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None

    def _devices(self) -> list[str]:
        """[trainer ranks] each one's `device_name`; empty where servers have devices of their own."""
        if not self._shares:
            return []
        names: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(names, device_name(self.device))
        return names


def _send(channel: SendChannel, parameters: Mapping[str, Tensor]) -> list[int]:
    checksum = Checksum(channel.plan.arch, channel.dtype, channel.device, channel.plan.workers)
    for number, messages in channel.rounds.items():
        channel.send(number, [(message, _pack(message, parameters, channel.dtype, checksum)) for message in messages])
    channel.finish()
    return checksum.values()


def _pack(message: Message, parameters: Mapping[str, Tensor], dtype: torch.dtype, checksum: Checksum) -> Tensor:
    """A message's values, each counted into the sum of its receiver as it lies in its tensor."""
    packed = []
    for _, alike in groupby(message.slices, key=lambda part: (part.height, part.width)):
        parts = list(alike)
        packed.append(torch.stack([_held(parameters, part, dtype) for part in parts]))
        checksum.add(message.peer, parts, packed[-1])
    return torch.cat([values.view(-1) for values in packed])


def _held(parameters: Mapping[str, Tensor], part: Slice, dtype: torch.dtype) -> Tensor:
    parameter = parameters.get(part.parameter)
    if parameter is None:
        raise TransferError(f"the trainer has no parameter {part.parameter}, which the plan sends from this rank")
    values = plane(parameter, part)
    if parameter.dtype != dtype or values.shape != (part.height, part.width):
        raise TransferError(
            f"parameter {part.parameter} is {parameter.dtype} {tuple(parameter.shape)}, which does not hold the "
            f"{part.height} x {part.width} values of {dtype} at {part.at} that the plan sends"
        )
    return values
