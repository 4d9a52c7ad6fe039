"""The messages of a weight update: of trainer and controller, controller and servers, trainer rank and worker.

`controller/weight_update.py` has their order. Imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, NonNegativeInt, SerializeAsAny

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models import architecture_of
from gspo_megatron.models.vllm_layout import ServerLayout
from gspo_megatron.models.weight_format import WeightFormat
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.wire_message import WireMessage


def _typed_architecture(value: Any) -> Any:
    """Its family decides which keys an architecture has."""
    return architecture_of(value) if isinstance(value, Mapping) else value


class WeightTerms(WireMessage):
    """What the trainer says of the weights that it is about to send."""

    architecture: SerializeAsAny[Annotated[Architecture, BeforeValidator(_typed_architecture)]]
    dtype: str
    """Of the trainer's weights, and of every value that is not quantised: `bfloat16`."""
    trainer: Layout
    """Its ranks are the first of the transfer group."""
    fp8: bool = False
    """The trainer sends matrices as fp8 with scales of blocks."""

    @property
    def form(self) -> WeightFormat:
        """The types of what is sent."""
        return WeightFormat(self.dtype, self.fp8)


class UpdateRequest(WireMessage):
    """Body of `POST /weights/begin`."""

    version: NonNegativeInt
    terms: WeightTerms
    devices: tuple[str, ...] = ()
    """[trainer ranks] device of each, if servers share the trainer's devices; empty = they do not."""


class UpdateTicket(WireMessage):
    """Where both sides of a weight update meet and what they agreed on; response of `POST /weights/begin`."""

    store_host: str
    """Host of the rendezvous store, which lives in the controller."""
    store_port: int
    group: str
    """Name of the process group; both sides use a group again that they still hold under this name."""
    bucket_mib: int
    """Most MiB that a worker receives in one round."""
    timeout: float
    """Seconds that one message may take; joining takes at most JOIN_SECONDS of `weights/wire.py`."""
    terms: WeightTerms
    servers: tuple[ServerLayout, ...]
    """Layout of each server; their workers follow the trainer ranks in this order."""
    proxies: tuple[int, ...] = ()
    """[workers] trainer rank on each worker's device, which hands over what is for it; empty = workers are ranks of the
    group. Two ranks of one NCCL group cannot share a device."""


class JoinRequest(WireMessage):
    """What a server's workers need to join an update; travels in the body of vLLM's `/init_weight_transfer_engine`."""

    ticket: UpdateTicket
    first_worker: int
    """Number of this server's worker 0 among the workers of all servers."""


class WorkerLayout(WireMessage):
    """The parallel layout of a server, reported by its worker 0."""

    layout: ServerLayout


class WorkerReport(WireMessage):
    """One worker's account of the last reception."""

    fault: str = ""
    """Why it is not complete; the other fields then say nothing. Empty = it is complete."""
    checksum: str = ""
    """Decimal text of a 64-bit sum."""
    tensors: int = 0
    seconds: float = 0.0
    received_bytes: int = 0
    needed_bytes: int = 0


class Probe(WireMessage):
    """A fixed token sequence that both sides score after every update."""

    token_ids: tuple[int, ...]
    """[length] ids."""
    logprobs: tuple[float, ...]
    """[length - 1], the trainer's log-probs of token_ids[1:] at temperature 1."""


class UpdateCheck(WireMessage):
    """Body of `POST /weights/finish`."""

    version: int
    checksums: tuple[int, ...]
    """[workers] what each must have received, modulo 2**64."""
    probes: tuple[Probe, ...]


class CanaryReport(WireMessage):
    """|log-prob difference| between trainer and server over the probes, in nats."""

    largest: float
    mean: float


class UpdateReport(CanaryReport):
    """Response of `POST /weights/finish`; the differences are over all servers."""

    seconds: float
    """Since `begin`."""
    transfer_seconds: float
    """Of the slowest worker."""
    received_over_needed: float
    """Of the worker that received most in excess; 1 = not a byte too many."""
    servers: dict[str, CanaryReport]
    """By address."""

    def metrics(self) -> dict[str, float]:
        """What the run log records of an update."""
        return {
            "canary_largest": self.largest,
            "canary_mean": self.mean,
            "transfer_seconds": self.transfer_seconds,
            "received_over_needed": self.received_over_needed,
        }


# Shared memory between a trainer rank and a worker on its device, over a loopback connection.


class WorkerGreeting(WireMessage):
    """First message of a worker to the trainer rank that hands weights over to it."""

    key: str
    """The job key."""
    worker: int


class CudaAllocation(WireMessage):
    """Arguments of torch's own CUDA IPC, byte strings in base64: no pickle crosses."""

    handle: str
    size: int
    offset: int
    counter: str
    counter_offset: int
    event: str
    waits: bool


class SharedMemory(WireMessage):
    """The memory that the trainer rank offers: a file of this host, or a CUDA allocation."""

    shape: tuple[int, int]
    """[rounds, values of the largest round]."""
    file: str = ""
    """Path of an unnamed file; empty on a GPU."""
    cuda: CudaAllocation | None = None


class RoundNumber(WireMessage):
    """To the worker: this round is in the memory. From the worker: it has been taken."""

    number: int
