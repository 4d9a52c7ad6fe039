"""Who may ask a role for anything but `/health`: the hosts of the job, with the job's key.

The key is one secret a job, in the environment only. The hosts are in the environment of a SLURM job; on one machine
servers listen on the loopback interface only, and no list is needed.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

KEY_VARIABLE = "GSPO_JOB_KEY"
ADDRESSES_VARIABLE = "GSPO_JOB_ADDRESSES"
OPEN_PATH = "/health"
REFUSAL = "this request does not carry the job key, or comes from a host that is not of the job"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def read_key() -> str:
    """The job key. Exits with a sentence where there is none: a role without a guard must not start."""
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise SystemExit(f"{KEY_VARIABLE} is not set; start this role through `gspo train`, which makes a key a job")
    return key


def key_header(key: str) -> dict[str, str]:
    """The request header that carries the key."""
    return {"Authorization": f"Bearer {key}"}


def is_same_key(own: str, given: str) -> bool:
    """Whether somebody gives a key; takes the same time for every wrong one, and any text, half characters too."""
    return secrets.compare_digest(own.encode(), given.encode(errors="replace"))


def has_key(headers: Mapping[str, str], key: str) -> bool:
    """Whether a request with these headers belongs to the job."""
    return is_same_key(f"Bearer {key}", headers.get("Authorization", ""))


def is_of_job(address: str | None) -> bool:
    """Whether an address is one of the job's hosts; without a list every one is."""
    listed = os.environ.get(ADDRESSES_VARIABLE, "")
    return not listed or address in listed.split(",")


class KeyGuard:
    """ASGI middleware for vLLM's server, whose own key leaves the control plane open."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.key = read_key()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == OPEN_PATH):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin1").title(): value.decode("latin1") for name, value in scope["headers"]}
        if scope["type"] == "http" and is_of_job((scope.get("client") or [None])[0]) and has_key(headers, self.key):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await refuse(send, 401, REFUSAL)
        else:
            await send({"type": "websocket.close", "code": 1008})


async def refuse(send: Send, status: int, sentence: str) -> None:
    """Answer a request with one sentence."""
    kind = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": kind})
    await send({"type": "http.response.body", "body": json.dumps({"error": sentence}).encode()})
