"""The server side of a weight update, in vLLM's worker processes."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import make_online_process_loader

from gspo_megatron.inference import (
    router_gate,  # noqa: F401  vLLM then builds routers whose logits are float32
    vllm_plugin,
)
from gspo_megatron.models.vllm_layout import ServerLayout, ServerParameter, server_parameters
from gspo_megatron.models.weight_format import WeightFormat
from gspo_megatron.transport import identity
from gspo_megatron.transport.messages import ServerIdentity
from gspo_megatron.transport.update_messages import JoinRequest, WorkerLayout, WorkerReport
from gspo_megatron.transport.weights.checksum import Checksum, add_parameter
from gspo_megatron.transport.weights.ipc import device_name, open_receive_channel
from gspo_megatron.transport.weights.wire import ReceiveChannel, receive
from gspo_megatron.transport.wire_message import WireMessage

# A worker that vLLM spawns imports this module as its extension. In an environment that has this package on its path
# but not installed, the entry point does not exist, and this is where the engine gets known.
vllm_plugin.register()

NOTHING_RECEIVED = "this worker has received nothing since the update started"


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """Body of `/init_weight_transfer_engine`."""

    request: str
    """JSON of a `JoinRequest`."""


@dataclass
class ReceiveInfo(WeightTransferUpdateInfo):
    """Body of `/update_weights`: empty, the ticket has said everything."""


class ShardTransferEngine(WeightTransferEngine[JoinInfo, ReceiveInfo]):
    """Receives this worker's own slices from the trainer ranks and hands them to vLLM one whole parameter at a time.

    Parameters are assembled in the layout in which vLLM creates them, and its layer-by-layer reload turns them into
    what the device computes with: kernels may repack a weight after loading (on CPU they always do), so that the live
    parameter is no place to write slices to.
    """

    init_info_cls = JoinInfo
    update_info_cls = ReceiveInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.channel: ReceiveChannel | None = None
        self.report = WorkerReport(fault=NOTHING_RECEIVED)
        self._apart = False

    @property
    def layout(self) -> ServerLayout:
        """The layout of this server."""
        parallel = self.parallel_config
        return ServerLayout(
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.data_parallel_size,
            parallel.enable_expert_parallel,
            expert_width(self.model),
        )

    @property
    def rank(self) -> int:
        """This worker's number within the server."""
        return self.parallel_config.data_parallel_index * self.parallel_config.world_size + self.parallel_config.rank

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Join the transfer; vLLM keeps this call waiting until all have."""
        request = JoinRequest.from_json(init_info.request)
        ticket = request.ticket
        if self.channel is None or self.channel.name != ticket.group:
            self.shutdown()
            self.channel = open_receive_channel(ticket, self.device, request.first_worker + self.rank)

    def start_weight_update(self) -> None:
        """Take the parameters apart; from here to a complete finish this model cannot serve."""
        self.report = WorkerReport(fault=NOTHING_RECEIVED)
        if self._apart:
            # An update broke on its way. Its half-filled layers must not count towards this one.
            finalize_layerwise_reload(self.model, self.model_config)
        initialize_layerwise_reload(self.model)
        self._apart = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, without its device synchronization, which knows no CPU."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ReceiveInfo) -> None:
        """Receive all parameters; what goes wrong is in the report.

        It is not raised: vLLM gives up a call to all workers at the first one that fails and takes the answers of the
        others for those to its next call (vllm 0.32).
        """
        try:
            self.report = self._receive()
        except RuntimeError as error:
            self.shutdown()
            self.report = WorkerReport(fault=str(error).splitlines()[0])

    def _receive(self) -> WorkerReport:
        """Receive, count each parameter into the checksum before anything packs it, and load it; the report."""
        channel = self.channel
        if channel is None:
            raise RuntimeError("this server has not joined the transfer; call /init_weight_transfer_engine first")
        started = time.perf_counter()
        plan = channel.plan
        expected = plan.form.wanted(server_parameters(plan.arch, self.layout, self.rank))
        checksum = Checksum(plan.arch, plan.form, self.device)
        refuse_other_model(self.model, expected, plan.form, self.layout)
        for parameter, values in receive(channel, expected):
            add_parameter(checksum, parameter, values)
            load_whole(self.model, parameter.name, values)
        return WorkerReport(
            checksum=str(checksum.values()[0]),
            tensors=len(expected),
            seconds=time.perf_counter() - started,
            received_bytes=sum(m.num_bytes for messages in channel.rounds.values() for m in messages),
            needed_bytes=sum(piece.size * plan.form.item_bytes(piece.tensor) for p in expected for piece in p.pieces),
        )

    def finish_weight_update(self) -> None:
        """Put the parameters together again, in the layout that this device computes with."""
        if self.report.fault:
            raise RuntimeError("the update is not complete; send all weights again before it is finished")
        finalize_layerwise_reload(self.model, self.model_config)
        self._apart = False
        if self.device.type == "cpu":
            pack_again(self.model)

    def shutdown(self) -> None:
        """Leave the transfer."""
        if self.channel is not None:
            self.channel.close()
        self.channel = None


def expert_width(model: torch.nn.Module) -> int:
    """The field of `ServerLayout`: what the kernels that vLLM has chosen for this device make of a slice."""
    shapes = [layer.moe_config for layer in model.modules() if isinstance(layer, RoutedExperts)]
    if not shapes or shapes[0].intermediate_size_per_partition == shapes[0].intermediate_size_per_partition_unpadded:
        return 0
    return shapes[0].intermediate_size_per_partition


def refuse_other_model(
    model: torch.nn.Module, expected: list[ServerParameter], form: WeightFormat, layout: ServerLayout
) -> None:
    """Hold what the plan will bring against the parameters of this worker. Raises RuntimeError with one sentence."""
    found = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    for parameter in expected:
        dtype = getattr(torch, form.dtype_of(parameter.name))
        has = found.pop(parameter.name, None)
        if has != (parameter.shape, dtype):
            raise RuntimeError(
                f"parameter {parameter.name} would come as {dtype} {parameter.shape}, and this server has "
                f"{'none' if has is None else f'{has[1]} {has[0]}'}; trainer and server must run the same model"
            )
    # vLLM makes these on every stage, or twice, and uses them where they are listed.
    unused = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    left = found.keys() - (unused if layout.pipeline > 1 else {"lm_head.weight"})
    # Of the KV cache: vLLM makes them where weights are fp8, sets them to 1 and drops them after loading.
    left = {name for name in left if not re.search(r"\.attn\.(q|k|v|prob)_scale$", name)}
    if left:
        raise RuntimeError(f"the update brings no weights for {', '.join(sorted(left)[:3])}; they would stay old")


def load_whole(model: torch.nn.Module, name: str, values: torch.Tensor) -> None:
    """Give vLLM's reload one parameter as this rank holds it; it processes a layer when it has all of them."""
    module, _, attribute = name.rpartition(".")
    layer = model.get_submodule(module)
    parameter = getattr(layer, attribute)
    # vLLM's own loader would cut its share out of the whole tensor of a checkpoint.
    parameter.weight_loader = copy_whole
    parameter.weight_loader = make_online_process_loader(layer, attribute)
    parameter.weight_loader(parameter, values)


def copy_whole(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    """A weight loader, with the argument names that vLLM's reload looks for."""
    param.data.copy_(loaded_weight)


def pack_again(model: torch.nn.Module) -> None:
    """Repack for vLLM's CPU kernels what its reload path leaves as it was (vllm 0.32).

    These are experts, and a layer that shares a weight with one before it, as a tied head does with the embedding: it
    has the new values, but computes with a packed copy of the old ones.
    """
    seen: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            kernel = layer.quant_method.moe_kernel
            assert kernel is not None, "vLLM builds it at the first load"
            kernel.fused_experts.process_weights_after_loading(layer)
        own = {id(parameter) for parameter in layer.parameters(recurse=False)}
        if own & seen:
            method = layer.quant_method
            assert isinstance(method, QuantizeMethodBase)
            method.process_weights_after_loading(layer)
        seen |= own


def as_text[**P](method: Callable[P, WireMessage]) -> Callable[P, str]:
    """Send a method's message as text: vLLM passes plain text on between its processes as it is."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> str:
        return method(*args, **kwargs).to_json()

    return call


class WorkerExtension:
    """Methods that vLLM mixes into its worker class, for `/collective_rpc`."""

    weight_transfer_engine: ShardTransferEngine
    model_config: ModelConfig
    _weight_update_active: bool

    @as_text
    def identity(self) -> ServerIdentity:
        """What `Identity.fault_of` reads; of the model that is loaded, not of the one that was requested."""
        return ServerIdentity(
            run=os.environ.get(identity.RUN_VARIABLE, ""),
            tokenizer=os.environ.get(identity.TOKENIZER_VARIABLE, ""),
            config=self.model_config.hf_text_config.to_json_string(use_diff=False),
            dtype=str(self.model_config.dtype).removeprefix("torch."),
            context=self.model_config.max_model_len,
        )

    @as_text
    def weight_layout(self) -> WorkerLayout:
        """The layout of this server."""
        return WorkerLayout(layout=self.weight_transfer_engine.layout)

    def device_name(self) -> str:
        """See `device_name` in `transport/weights/ipc.py`."""
        return device_name(self.weight_transfer_engine.device)

    def forget_update(self) -> None:
        """Let a new update start even if the last one was never finished: its controller refused it, or is gone."""
        self._weight_update_active = False

    def leave_transfer(self) -> None:
        """Close this worker's end of the wire, so that a trainer that sends to it does not wait for the time limit."""
        self.weight_transfer_engine.shutdown()

    @as_text
    def weight_report(self) -> WorkerReport:
        """Of the last reception."""
        return self.weight_transfer_engine.report
