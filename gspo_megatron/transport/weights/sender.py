"""The trainer's end of a weight update: every rank sends the slices that the plan gives it. Imports no vllm.

Where servers hold fp8, the ranks first agree on the scale of every block, and bytes and scales are what is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.weight_format import SCALE, is_quantised
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.controller_client import ControllerClient
from gspo_megatron.transport.update_messages import UpdateRequest, UpdateTicket, WeightTerms
from gspo_megatron.transport.weights.checksum import MASK, Checksum, plane
from gspo_megatron.transport.weights.ipc import device_name, open_send_channel
from gspo_megatron.transport.weights.plan import Message, Slice
from gspo_megatron.transport.weights.quantiser import BlockScales
from gspo_megatron.transport.weights.wire import SendChannel, TransferError

BROKEN = "the weight update broke between the trainer and the servers"
ATTEMPTS = 3
"""Transfers of one update: a server that is lost on the way costs another one, without it."""


def first_cause(faults: Sequence[str]) -> str:
    """The fault that is no consequence of another rank's: a connection that ended has its reason elsewhere."""
    return min(faults, key=lambda fault: fault.startswith(BROKEN), default="")


class WeightSender:
    """One trainer rank's end; kept for the whole run, so that an unchanged set of servers keeps its connections."""

    def __init__(self, device: torch.device, *, shares: bool, fp8: bool = False) -> None:
        """Take this rank's device, whether servers share the trainer's devices, and whether they hold fp8."""
        self.device, self._shares, self._fp8 = device, shares, fp8
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
            controller: on trainer rank 0 only.
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
        terms = WeightTerms(architecture=arch, dtype=dtype, trainer=layout, fp8=self._fp8)
        request = UpdateRequest(version=version, terms=terms, devices=self._devices())
        scales = None
        if self._fp8:
            scales = BlockScales(terms.form, arch, self.device)
            scales.measure(layout, dist.get_rank(), parameters)
            dist.all_reduce(scales.maxima, dist.ReduceOp.MAX)
        for _ in range(ATTEMPTS):
            tickets = [controller.begin_update(request) if controller is not None else None]
            dist.broadcast_object_list(tickets, src=0)
            assert tickets[0] is not None
            mine: list[int] | str
            try:
                mine = self.send(tickets[0], dist.get_rank(), parameters, scales)
            except TransferError as error:
                mine = str(error)
            sums: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(sums, mine)
            fault = first_cause([entry for entry in sums if isinstance(entry, str)])
            if not fault:
                return [sum(column) & MASK for column in zip(*sums, strict=True)]
            self.close()
        raise TransferError(fault)

    def send(
        self, ticket: UpdateTicket, rank: int, parameters: Mapping[str, Tensor], scales: BlockScales | None = None
    ) -> list[int]:
        """Send this rank's slices to the workers; all trainer ranks do so at the same time.

        Args:
            ticket: the response of `ControllerClient.begin_update`, the same on every rank.
            rank: this trainer rank.
            parameters: this rank's parameters under their global Megatron names.
            scales: of the blocks, on which all ranks have agreed; where the ticket is of fp8.

        Returns:
            [workers] checksum of what went to each worker; over all ranks they add up, modulo 2**64, to what the worker
            must hold.

        Raises:
            TransferError: a server was lost, or a parameter is not what the plan says.
        """
        try:
            if self._channel is None or self._channel.name != ticket.group:
                self.close()
                self._channel = open_send_channel(ticket, self.device, rank)
            return _send(self._channel, parameters, scales)
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

    def _devices(self) -> tuple[str, ...]:
        """[trainer ranks] each one's `device_name`; empty where servers have devices of their own."""
        if not self._shares:
            return ()
        names: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(names, device_name(self.device))
        return tuple(names)


def _send(channel: SendChannel, parameters: Mapping[str, Tensor], scales: BlockScales | None) -> list[int]:
    plan = channel.plan
    assert plan.form.fp8 == (scales is not None), "scales come with a ticket of fp8"
    checksum = Checksum(plan.arch, plan.form, channel.device, plan.workers)
    source = _Source(parameters, getattr(torch, plan.form.dtype), scales)
    for number, messages in channel.rounds.items():
        channel.send(number, [(message, _pack(message, source, checksum)) for message in messages])
    channel.finish()
    return checksum.values()


def _pack(message: Message, source: _Source, checksum: Checksum) -> Tensor:
    """A message's bytes, each value counted into the sum of its receiver as it lies in its tensor."""
    packed = []
    for _, alike in groupby(message.slices, key=lambda part: (part.height, part.width, source.kind(part))):
        parts = list(alike)
        values = torch.stack([source.values(part) for part in parts])
        checksum.add(message.peer, parts, values)
        packed.append(values.view(-1).view(torch.uint8))
    return torch.cat(packed)


class _Source:
    """What slices are made of: a rank's parameters, and scales where they are quantised."""

    def __init__(self, parameters: Mapping[str, Tensor], dtype: torch.dtype, scales: BlockScales | None) -> None:
        self._parameters, self._dtype, self._scales = parameters, dtype, scales

    def kind(self, part: Slice) -> str:
        """What a slice consists of; slices of one kind have values of one type."""
        if self._scales is None:
            return "values"
        return "scales" if part.tensor.endswith(SCALE) else "bytes" if is_quantised(part.tensor) else "values"

    def values(self, part: Slice) -> Tensor:
        """[height, width] of a slice, in the type that travels. Raises TransferError."""
        kind = self.kind(part)
        if self._scales is not None and kind == "scales":
            whole = self._scales.scales(part.tensor)
            return whole[part.row : part.row + part.height, part.column : part.column + part.width]
        held = _held(self._parameters, part, self._dtype)
        if self._scales is not None and kind == "bytes":
            return self._scales.encode(part.tensor, part.row, part.column, held)
        return held


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
