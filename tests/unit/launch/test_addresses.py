"""Of a SLURM job only its own hosts may ask its roles for anything, whatever key they carry."""

from __future__ import annotations

from typing import Any

import pytest

from gspo_megatron.transport.auth import ADDRESSES_VARIABLE, KEY_VARIABLE, KeyGuard, is_of_job, key_header


def test_hosts_of_the_job_are_let_in_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDRESSES_VARIABLE, "10.0.0.1,10.0.0.12")
    assert is_of_job("10.0.0.12") and not is_of_job("10.0.0.2") and not is_of_job(None)
    monkeypatch.delenv(ADDRESSES_VARIABLE)
    assert is_of_job("127.0.0.1"), "one machine: servers listen on the loopback interface only"


@pytest.mark.parametrize(("client", "status"), [("10.0.0.1", 200), ("10.0.0.9", 401)])
async def test_a_servers_guard_asks_for_the_address_too(
    monkeypatch: pytest.MonkeyPatch, client: str, status: int
) -> None:
    monkeypatch.setenv(ADDRESSES_VARIABLE, "10.0.0.1")
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def receive() -> Any: ...

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(name.lower().encode(), value.encode()) for name, value in key_header("secret").items()]
    scope = {"type": "http", "path": "/pause", "headers": headers, "client": (client, 40000)}
    await KeyGuard(app)(scope, receive, send)
    assert sent[0]["status"] == status
