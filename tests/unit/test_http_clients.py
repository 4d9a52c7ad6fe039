"""Requests between roles go directly, whatever proxy the site has: the key reaches its receiver and nobody else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gspo_megatron.cluster.server_health import ServerHealth
from gspo_megatron.controller.server_client import ServerClient
from gspo_megatron.http_clients import direct_client
from gspo_megatron.transport.auth import key_header
from gspo_megatron.transport.controller_client import ControllerClient, ControllerError

KEY = "unit-test-key"
PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


class Listener(ThreadingHTTPServer):
    """Records what it is sent. It answers everything, as a proxy or as a role."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Listener)
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def listeners() -> Iterator[tuple[Listener, Listener]]:
    """A role, and what plays the proxy."""
    both = (Listener(), Listener())
    threads = [threading.Thread(target=one.serve_forever, args=(0.01,)) for one in both]
    for thread in threads:
        thread.start()
    yield both
    for one, thread in zip(both, threads, strict=True):
        one.shutdown()
        thread.join()
        one.server_close()


def ask_controller(url: str) -> None:
    client = ControllerClient(url, KEY)
    with pytest.raises(ControllerError, match="cannot be read"):  # `{}` is no status, but it arrived
        client.status()
    client.close()


def ask_server(url: str) -> None:
    async def ask() -> None:
        client = ServerClient(url, KEY, 10, 10, 1)
        assert await client.is_healthy()
        await client.close()

    asyncio.run(ask())


def ask_health(url: str) -> None:
    health = ServerHealth("127.0.0.1", int(url.rpartition(":")[2]))
    health.look()
    assert health.served


def ask_once(url: str) -> None:
    with direct_client(headers=key_header(KEY)) as client:
        assert client.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize("ask", [ask_controller, ask_server, ask_health, ask_once])
@pytest.mark.parametrize("without", [None, "", "localhost", "10.0.0.0/8,.cluster"])
@pytest.mark.parametrize("scheme", ["http", "nonsense"])
def test_no_proxy_is_asked(
    ask, without: str | None, scheme: str, listeners: tuple[Listener, Listener], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    role, proxy = listeners
    for name in PROXIES:
        monkeypatch.setenv(name, f"{scheme}://127.0.0.1:{proxy.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        if without is not None:
            monkeypatch.setenv(name, without)
    # Credentials that a library would send in place of the key.
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    ask(role.url)
    assert proxy.seen == []
    assert [header for _, header in role.seen] == [None if ask is ask_health else f"Bearer {KEY}"]
