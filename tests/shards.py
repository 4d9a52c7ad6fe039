"""Trainer ranks without Megatron: what each holds, cut from Hugging Face tensors by the table, and one thread each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.hf_table import hf_shapes, local_parameters
from gspo_megatron.models.qwen3.architecture import Qwen3Architecture
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.update_messages import UpdateTicket
from gspo_megatron.transport.weights.checksum import MASK
from gspo_megatron.transport.weights.quantiser import BlockScales
from gspo_megatron.transport.weights.sender import WeightSender, first_cause
from gspo_megatron.transport.weights.wire import TransferError

CPU = torch.device("cpu")
ARCH = Qwen3Architecture(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    max_position_embeddings=128,
)


def make_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in hf_shapes(ARCH).items()}


def cut_shards(
    arch: Architecture, layout: Layout, tensors: Mapping[str, torch.Tensor]
) -> list[dict[str, torch.Tensor]]:
    """For each trainer rank its parameters under their global names."""
    shards: list[dict[str, torch.Tensor]] = []
    for rank in range(layout.world):
        held: dict[str, torch.Tensor] = {}
        for chunk in range(layout.virtual):
            for entry in local_parameters(arch, layout, layout.coordinates(rank), chunk):
                value = torch.empty(entry.shape, dtype=next(iter(tensors.values())).dtype)
                for piece in entry.pieces:
                    part = tensors[piece.tensor][slice(*piece.rows)]
                    value[slice(*piece.at)] = part if piece.columns is None else part[:, slice(*piece.columns)]
                held[entry.name] = value
        shards.append(held)
    return shards


def agree_on_scales(ticket: UpdateTicket, shards: Sequence[Mapping[str, torch.Tensor]]) -> BlockScales | None:
    """The scales of blocks after what ranks do with an all-reduce; None where nothing is quantised."""
    terms = ticket.terms
    if not terms.fp8:
        return None
    ranks = [BlockScales(terms.form, terms.architecture, CPU) for _ in shards]
    for rank, (scales, shard) in enumerate(zip(ranks, shards, strict=True)):
        scales.measure(terms.trainer, rank, shard)
    ranks[0].maxima.copy_(torch.stack([scales.maxima for scales in ranks]).amax(0))
    return ranks[0]


class TrainerRanks:
    """The senders of all trainer ranks of a layout, kept from update to update."""

    def __init__(self, world: int) -> None:
        self.senders = [WeightSender(CPU, shares=False) for _ in range(world)]

    def send(self, ticket: UpdateTicket, shards: Sequence[Mapping[str, torch.Tensor]]) -> list[int]:
        """One transfer from all ranks; what every worker must have received. Raises TransferError with the cause."""
        scales = agree_on_scales(ticket, shards)
        with ThreadPoolExecutor(len(shards)) as pool:
            found = list(
                pool.map(self._send, range(len(shards)), [ticket] * len(shards), shards, [scales] * len(shards))
            )
        faults = [str(entry) for entry in found if isinstance(entry, TransferError)]
        if faults:
            for sender in self.senders:
                sender.close()
            raise TransferError(first_cause(faults))
        return [sum(column) & MASK for column in zip(*found, strict=True)]

    def _send(
        self, rank: int, ticket: UpdateTicket, shard: Mapping[str, torch.Tensor], scales: BlockScales | None
    ) -> list[int] | TransferError:
        try:
            return self.senders[rank].send(ticket, rank, shard, scales)
        except TransferError as error:
            return error
