"""The controller's HTTP interface as a table: both the service and its client read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gspo_megatron.transport.messages import (
    ControllerState,
    ControllerStatus,
    Empty,
    EvaluationReport,
    EvaluationRequest,
    RolloutBatch,
    RolloutRequest,
)
from gspo_megatron.transport.update_messages import UpdateCheck, UpdateReport, UpdateRequest, UpdateTicket
from gspo_megatron.transport.wire_message import WireMessage


@dataclass(frozen=True, slots=True)
class Route[Request: WireMessage, Response: WireMessage]:
    """One request that the controller answers."""

    method: Literal["GET", "POST"]
    path: str
    request: type[Request]
    """Class of the body; `Empty` for a GET, which has none."""
    response: type[Response]
    """Class of the response with status 200; every other status comes with an `ErrorReply`."""


HEALTH = Route("GET", "/health", Empty, Empty)
STATUS = Route("GET", "/status", Empty, ControllerStatus)
READ_STATE = Route("GET", "/state", Empty, ControllerState)
RESTORE_STATE = Route("POST", "/state", ControllerState, Empty)
ROLLOUT = Route("POST", "/rollout", RolloutRequest, RolloutBatch)
EVALUATE = Route("POST", "/evaluate", EvaluationRequest, EvaluationReport)
SLEEP = Route("POST", "/sleep", Empty, Empty)
BEGIN_UPDATE = Route("POST", "/weights/begin", UpdateRequest, UpdateTicket)
FINISH_UPDATE = Route("POST", "/weights/finish", UpdateCheck, UpdateReport)

ROUTES = (
    HEALTH, STATUS, READ_STATE, RESTORE_STATE, ROLLOUT, EVALUATE, SLEEP, BEGIN_UPDATE, FINISH_UPDATE,
)  # fmt: skip
