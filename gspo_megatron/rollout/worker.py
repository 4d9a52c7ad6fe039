"""The server side of a weight update, in vLLM's worker processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from gspo_megatron.rollout import plugin
from gspo_megatron.rollout.transfer import Checksum, Ticket, TransferGroup, unpack
from gspo_megatron.weights.buckets import plan_buckets, read_manifest

# A worker that vLLM spawns imports this module as its extension. In an environment that has this package on its path
# but not installed, the entry point does not exist, and this is where the engine gets known.
plugin.register()


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """Body of `/init_weight_transfer_engine`."""

    ticket: dict[str, Any]
    """The fields of a `Ticket`."""
    first_rank: int
    """Rank of this server's worker 0 in the group."""


@dataclass
class ReceiveInfo(WeightTransferUpdateInfo):
    """Body of `/update_weights`."""

    manifest: list[tuple[str, str, list[int]]]
    """`[name, dtype, shape]` of every tensor, in sending order."""


class PackedTransferEngine(WeightTransferEngine[JoinInfo, ReceiveInfo]):
    """Receives packed buckets by broadcast from trainer rank 0 and loads them as a checkpoint, layer by layer."""

    init_info_cls = JoinInfo
    update_info_cls = ReceiveInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group: TransferGroup | None = None
        self.bucket_mib = 0
        self.report: dict[str, Any] = {}
        self._missing: set[str] = set()
        self._apart = False

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Join the group; vLLM keeps this call waiting until all ranks have."""
        ticket = Ticket(**init_info.ticket)
        self.bucket_mib = ticket.bucket_mib
        if self.group is None or self.group.name != ticket.group:
            self.group = None
            parallel = self.parallel_config
            worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
            self.group = TransferGroup(ticket, init_info.first_rank + worker, self.device)

    def start_weight_update(self) -> None:
        """Take the parameters apart; from here to a complete finish this model cannot serve."""
        self.report = {}
        if self._apart:
            # An update broke on its way. Its half-filled layers must not count towards this one.
            finalize_layerwise_reload(self.model, self.model_config)
        initialize_layerwise_reload(self.model)
        self._apart = True
        self._missing = {name for name, _ in self.model.named_parameters()}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, without its device synchronization, which knows no CPU."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ReceiveInfo) -> None:
        """Receive all tensors, count each into the checksum before anything packs it, and load it."""
        if self.group is None:
            raise RuntimeError("this server has not joined the transfer; call /init_weight_transfer_engine first")
        started = time.perf_counter()
        manifest = read_manifest(update_info.manifest)
        checksum = Checksum()
        load: Callable[[list[tuple[str, torch.Tensor]]], set[str]] = self.model.load_weights  # type: ignore[assignment]
        try:
            for name, tensor in unpack(manifest, plan_buckets(manifest, self.bucket_mib), self.group, self.device):
                checksum.add(name, tensor)
                self._missing -= load([(name, tensor)])
        except BaseException:
            self.group = None
            raise
        seconds = time.perf_counter() - started
        self.report = {"checksum": str(checksum.value()), "tensors": len(manifest), "seconds": seconds}

    def finish_weight_update(self) -> None:
        """Put the parameters together again, in the layout that this device computes with."""
        if self._missing:
            raise RuntimeError(f"the update brought no weights for {', '.join(sorted(self._missing)[:3])}")
        finalize_layerwise_reload(self.model, self.model_config)
        self._apart = False
        if self.device.type == "cpu":
            pack_experts(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        self.group = None


def pack_experts(model: torch.nn.Module) -> None:
    """Bring experts into the layout of vLLM's CPU kernel, which its reload path leaves out (vllm 0.32)."""
    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            kernel = layer.quant_method.moe_kernel
            assert kernel is not None, "vLLM builds it at the first load"
            kernel.fused_experts.process_weights_after_loading(layer)


class WorkerExtension:
    """Methods that vLLM mixes into its worker class, for `/collective_rpc`."""

    weight_transfer_engine: PackedTransferEngine
    _weight_update_active: bool

    def forget_update(self) -> None:
        """Let a new update start even if the last one was never finished: its controller refused it, or is gone."""
        self._weight_update_active = False

    def leave_transfer(self) -> None:
        """Close this worker's end of the wire, so that a trainer that sends to it does not wait for the time limit."""
        self.weight_transfer_engine.shutdown()

    def weight_report(self) -> dict[str, Any]:
        """Checksum (decimal text), number of tensors and seconds of the last complete reception."""
        return self.weight_transfer_engine.report
