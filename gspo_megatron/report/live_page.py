"""`gspo watch --web`: the page of a run, live, and all of its responses, served to this machine alone.

Every address begins with a random word, so that other users of the machine cannot read the run, and a request must name
this machine as its host, so that no foreign page can.

    /WORD/               the page
    /WORD/run?mark=M     its data as JSON; 304 while they are those of the mark
    /WORD/responses?...  a page of responses, by the fields of `Query`: {total, items, note}
"""

from __future__ import annotations

import json
import math
import secrets
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gspo_megatron.config import RecipeError
from gspo_megatron.metric_rows import RowReader, by_step
from gspo_megatron.report.page import SCRIPTS, make_page
from gspo_megatron.report.page_data import read_run
from gspo_megatron.report.panels import Json
from gspo_megatron.report.response_pages import Catalogue, Query
from gspo_megatron.report.run_state import read_state
from gspo_megatron.run_dir import RunDir

HOSTS = ("127.0.0.1", "localhost")
MOST_ITEMS = 100
"""Responses of one answer."""


class LiveRun:
    """One run as the server reads it; its threads take turns."""

    def __init__(self, run_dir: Path) -> None:
        self.run = RunDir(run_dir)
        self._rows, self._responses = RowReader(self.run.metrics), Catalogue(self.run)
        self._lock = threading.Lock()
        self._kept: tuple[str, Json] = ("", {})

    def data(self, mark: str = "") -> Json | None:
        """What the page shows now; None where it is what it was at the mark.

        Raises:
            OSError, RecipeError, ValueError: the directory is gone, or cannot be read now.
        """
        with self._lock:
            if not self.run.path.is_dir():
                raise FileNotFoundError(f"{self.run.path} is not there")
            rows = by_step(self._rows.read())
            now = self._mark(rows)
            if now == mark:
                return None
            if now != self._kept[0]:
                self._kept = (now, read_run(self.run.path, live=True, rows=rows) | {"mark": now})
            return self._kept[1]

    def _mark(self, rows: list[dict[str, Any]]) -> str:
        """Differs when anything that the page shows has changed."""
        state = read_state(self.run, rows, None)
        sizes = [file.stat().st_size if file.is_file() else -1 for file in (self.run.metrics, self.run.warnings)]
        return "-".join(map(str, (state.kind, state.step, len(rows), *sizes)))

    def responses(self, query: Query, offset: int, limit: int) -> Json:
        """A page of responses."""
        with self._lock:
            total, items = self._responses.page(query, max(offset, 0), min(max(limit, 1), MOST_ITEMS))
        return {"total": total, "items": items, "note": ""}


def read_query(text: str) -> tuple[Query, int, int]:
    """Query, offset and limit of an address.

    Raises:
        ValueError: a field is no number.
    """
    asked = {name: values[-1] for name, values in parse_qs(text).items()}

    def number(name: str, missing: float) -> float:
        value = float(asked.get(name, missing))
        if math.isnan(value):
            raise ValueError(f"{name} is no number")
        return value

    def interval(name: str) -> tuple[float, float]:
        return number(f"{name}_low", -math.inf), number(f"{name}_high", math.inf)

    query = Query(
        interval("step"), interval("reward"), interval("length"), "clipped" in asked, asked.get("lost", ""),
        int(asked["prompt"]) if "prompt" in asked else None, asked.get("contains", ""), asked.get("order", "stored"),
    )  # fmt: skip
    return query, int(asked.get("offset", 0)), int(asked.get("limit", 10))


class _Handler(BaseHTTPRequestHandler):
    @property
    def _served(self) -> LiveServer:
        assert isinstance(self.server, LiveServer)
        return self.server

    def do_GET(self) -> None:
        """Answer one request."""
        host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        address = urlsplit(self.path)
        word, _, name = address.path.removeprefix("/").partition("/")
        if host not in HOSTS or not secrets.compare_digest(word.encode(), self._served.word.encode()):
            self._send(403, "use the address that gspo watch printed")
            return
        try:
            self._answer(name, address.query)
        except (OSError, RecipeError, ValueError) as error:
            if not isinstance(error, BrokenPipeError):
                self._send(503, str(error))

    def _answer(self, name: str, query: str) -> None:
        if name == "":
            data = self._served.live.data()
            assert data is not None
            self._send(200, make_page(data, SCRIPTS), "text/html")
        elif name == "run":
            data = self._served.live.data(parse_qs(query).get("mark", [""])[-1])
            self._send(304, "") if data is None else self._send(200, _json(data), "application/json")
        elif name == "responses":
            try:
                asked = read_query(query)
            except ValueError as error:
                self._send(400, str(error))
            else:
                self._send(200, _json(self._served.live.responses(*asked)), "application/json")
        else:
            self._send(404, "no such page")

    def _send(self, status: int, text: str, kind: str = "text/plain") -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal shows the address."""


def _json(data: Json) -> str:
    return json.dumps(data, allow_nan=False, separators=(",", ":"))


class LiveServer(ThreadingHTTPServer):
    """Serves one run on the loopback interface: `with LiveServer(run_dir) as server: server.serve_forever()`."""

    daemon_threads = True

    def __init__(self, run_dir: Path, port: int = 0) -> None:
        """Listen. Raises OSError where the port is taken; 0 takes a free one."""
        self.live, self.word = LiveRun(run_dir), secrets.token_urlsafe(12)
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def address(self) -> str:
        """Where a browser of this machine finds the page."""
        return f"http://127.0.0.1:{self.server_port}/{self.word}/"

    @property
    def tunnel(self) -> str:
        """What makes the address reachable from another machine."""
        return f"ssh -L {self.server_port}:127.0.0.1:{self.server_port} {socket.gethostname()}"
