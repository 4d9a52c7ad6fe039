"""Which slice of which trainer shard goes to which place of which server worker, in which round of a weight update.

Every rank of both sides computes the same plan from the layouts alone. All layers of a model are alike, so one layer is
planned and repeated; so is the choice of senders, because every pipeline stage of the trainer has the same ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import numpy as np

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.hf_table import local_parameters
from gspo_megatron.models.vllm_layout import ServerLayout, server_parameters
from gspo_megatron.models.weight_format import WeightFormat
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.weights.flows import Names, Requirement, assign_senders, bytes_of, collect, schedule

LAYER = "layers.0."
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Slice:
    """A rectangle of a Hugging Face tensor on its way, and where it lies in a parameter at this end."""

    tensor: str
    """Hugging Face name."""
    row: int
    """Its first row in that tensor."""
    column: int
    """Its first column there; 0 for a vector."""
    height: int
    """Rows."""
    width: int
    """Columns; 1 for a vector."""
    parameter: str
    """Megatron's global name at the sender, vLLM's name at the receiver."""
    at: tuple[int, int, int]
    """(expert, row, column) of its first value in that parameter; the expert is 0 where there is no such dimension."""

    @property
    def size(self) -> int:
        """Values."""
        return self.height * self.width


@dataclass(frozen=True, slots=True)
class Message:
    """What one trainer rank sends to one worker in one round, packed without gaps in this order."""

    round: int
    """Both ends take rounds in order; a rank may have nothing to do in some."""
    peer: int
    """Trainer rank for a receiver, worker for a sender; workers count over all servers."""
    slices: tuple[Slice, ...]
    """Never empty."""
    num_bytes: int
    """Of all their values."""


@dataclass(frozen=True, slots=True)
class Section:
    """What one trainer stage sends of a part of the model: of one layer, or of what lies outside of all."""

    flows: np.ndarray
    """Rows of FLOW in the order of their rounds; senders count within a stage, receivers are seats."""
    rounds: int
    """Rounds it takes."""


@dataclass(frozen=True, slots=True)
class Step:
    """One section sent by one trainer stage."""

    section: Section
    layer: int
    """Global layer number; 0 outside the layers."""
    stage: int
    """Trainer stage."""
    first_round: int
    """Round in which it begins."""
    workers: np.ndarray
    """[seats] worker that takes each seat."""


class TransferPlan:
    """The plan of a weight update; equal wherever it is computed from equal arguments."""

    def __init__(
        self,
        arch: Architecture,
        trainer: Layout,
        servers: Sequence[ServerLayout],
        form: WeightFormat,
        bucket_bytes: int,
    ) -> None:
        """
        Args:
            arch: the model.
            trainer: layout of the trainer ranks.
            servers: layout of each server; workers count over all of them, in this order.
            form: types of what travels.
            bucket_bytes: most bytes that one worker receives in one round; a single row may exceed it.

        Raises:
            ValueError: the servers cannot hold the model so.
        """
        self.arch, self.trainer, self.servers, self.form = arch, trainer, tuple(servers), form
        self.first_worker = np.cumsum([0, *(server.world for server in servers)])
        """[servers + 1] first worker of each server, and the number of workers."""
        # A seat is a worker's place within a stage of its server.
        self._seats = [
            (index, data, tensor)
            for index, server in enumerate(servers)
            for data in range(server.data)
            for tensor in range(server.tensor)
        ]
        self._names = Names()
        # Stages send at the same time, and a round may take up to twice what it aims at.
        self._limit = max(1, bucket_bytes // (2 * trainer.pipeline))
        self.steps = list(self._steps())

    @property
    def workers(self) -> int:
        """Workers of all servers."""
        return int(self.first_worker[-1])

    def _steps(self) -> Iterator[Step]:
        """Every section with its stage and its rounds, in the order in which each stage sends."""
        trainer, count = self.trainer, self.arch.num_hidden_layers
        requirement, stage_ranks = self._requirement(), self.trainer.world // self.trainer.pipeline
        layered = self._named(requirement, lambda name: LAYER in name)
        embedded = self._named(requirement, lambda name: name == EMBEDDING)
        # The last stage of a server holds a tied head as an embedding of its own.
        staged = np.array([self.servers[index].pipeline > 1 for index, _, _ in self._seats])[
            requirement.flows["receiver"]
        ]
        loads = np.zeros(stage_ranks)
        layer = self._section(requirement.where(layered), loads)
        sizes = trainer.stage_sizes(count)
        first_loads, last_loads = loads * sizes[0], loads * sizes[-1]
        first = self._section(requirement.where(embedded), first_loads)
        tied = self._section(requirement.where(embedded & staged & self.arch.tie_word_embeddings), first_loads)
        last = self._section(
            requirement.where(~layered & ~embedded), first_loads if trainer.pipeline == 1 else last_loads
        )
        for stage in range(trainer.pipeline):
            parts = [(first, 0, 0), (tied, 0, count - 1)] if stage == 0 else []
            parts += [(layer, n, n) for chunk in range(trainer.virtual) for n in trainer.layers(count, stage, chunk)]
            parts += [(last, 0, count - 1)] if stage == trainer.pipeline - 1 else []
            at = 0
            for section, number, beside in parts:
                yield Step(section, number, stage, at, self._workers_at(beside))
                at += section.rounds

    def _requirement(self) -> Requirement:
        """What the seats of one stage need of a model of one layer."""
        trainer = self.trainer
        one = self.arch.model_copy(update={"num_hidden_layers": 1})
        flat = Layout(
            trainer.world // trainer.pipeline,
            tensor=trainer.tensor,
            context=trainer.context,
            expert=trainer.expert,
            expert_tensor=trainer.expert_tensor,
        )
        form = self.form
        held = [form.held(local_parameters(one, flat, flat.coordinates(rank))) for rank in range(flat.world)]
        wanted = []
        for index, data, tensor in self._seats:
            alone = replace(self.servers[index], pipeline=1)
            wanted.append(form.wanted(server_parameters(one, alone, alone.rank(data, 0, tensor))))
        return collect(held, wanted, self._names, form.item_bytes)

    def _named(self, requirement: Requirement, chosen: Callable[[str], bool]) -> np.ndarray:
        """[flows] bool: whether the tensor is one of those."""
        return np.array([chosen(name) for name in self._names.list])[requirement.flows["tensor"]]

    def _section(self, requirement: Requirement, loads: np.ndarray) -> Section:
        flows = schedule(assign_senders(requirement, loads), len(loads), len(self._seats), self._limit)
        return Section(flows, int(flows["round"].max(initial=-1)) + 1)

    def _workers_at(self, layer: int) -> np.ndarray:
        """[seats] the worker that takes each seat on the server stages that hold a layer."""
        found = []
        for index, data, tensor in self._seats:
            server = self.servers[index]
            stage = next(n for n in range(server.pipeline) if layer in server.layers(self.arch.num_hidden_layers, n))
            found.append(self.first_worker[index] + server.rank(data, stage, tensor))
        return np.array(found)

    def to_send(self, rank: int) -> list[Message]:
        """Everything that a trainer rank sends, by round and worker."""
        stage_ranks = self.trainer.world // self.trainer.pipeline
        stage, seat = divmod(rank, stage_ranks)
        found: list[Message] = []
        for step in self.steps:
            if step.stage == stage:
                flows = step.section.flows
                found += self._messages(step, flows[flows["sender"] == seat], "receiver", step.workers, "source")
        return sorted(found, key=_order)

    def to_receive(self, worker: int) -> list[Message]:
        """Everything that a worker receives, by round and trainer rank."""
        stage_ranks = self.trainer.world // self.trainer.pipeline
        found: list[Message] = []
        for step in self.steps:
            ranks = step.stage * stage_ranks + np.arange(stage_ranks)
            for seat in np.flatnonzero(step.workers == worker):
                flows = step.section.flows
                found += self._messages(step, flows[flows["receiver"] == seat], "sender", ranks, "target")
        return sorted(found, key=_order)

    def _messages(
        self, step: Step, flows: np.ndarray, peer: str, ranks: np.ndarray, end: Literal["source", "target"]
    ) -> Iterator[Message]:
        """Rows of one rank as messages; rows of one message keep the order that they have in the section."""
        names = [name.replace(LAYER, f"layers.{step.layer}.") for name in self._names.list]
        flows = flows[np.lexsort((flows[peer], flows["round"]))]
        expert = flows["target_expert"] if end == "target" else np.zeros(len(flows), np.int64)
        fields = [flows[name] for name in ("tensor", "row", "column", "height", "width", end)]
        fields += [expert, flows[f"{end}_row"], flows[f"{end}_column"], bytes_of(flows)]
        rows = zip(*(column.tolist() for column in (*fields, flows["round"], ranks[flows[peer]])), strict=True)
        for (number, rank), group in groupby(rows, key=lambda row: row[-2:]):
            slices, num_bytes = [], 0
            for tensor, row, column, height, width, parameter, expert, at_row, at_column, size, _, _ in group:
                at = (expert, at_row, at_column)
                slices.append(Slice(names[tensor], row, column, height, width, names[parameter], at))
                num_bytes += size
            yield Message(step.first_round + number, rank, tuple(slices), num_bytes)

    def sent_bytes(self) -> np.ndarray:
        """[trainer ranks] bytes."""
        stage_ranks = self.trainer.world // self.trainer.pipeline
        sent = np.zeros(self.trainer.world, np.int64)
        for step in self.steps:
            np.add.at(sent, step.stage * stage_ranks + step.section.flows["sender"], bytes_of(step.section.flows))
        return sent

    def received_bytes(self) -> np.ndarray:
        """[workers] bytes."""
        received = np.zeros(self.workers, np.int64)
        for step in self.steps:
            np.add.at(received, step.workers[step.section.flows["receiver"]], bytes_of(step.section.flows))
        return received


def _order(message: Message) -> tuple[int, int]:
    return message.round, message.peer
