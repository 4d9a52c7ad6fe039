"""What the sections of a model behind an OpenAI-style URL have in common: `reward.judge` and `teacher`."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from gspo_megatron.config.base import Section
from gspo_megatron.config.secret_text import SECRET

ENDPOINTS = ("/chat/completions", "/completions")
"""Ends of an address that requests add themselves."""


class ModelServerSection(Section):
    """A server of the user's that the run asks. It is reached directly, without a proxy of the site."""

    url: str
    """Base address, `http://HOST:PORT/v1`, to which each request adds its path."""
    model: str = Field(min_length=1)
    """Name of the model, as the server knows it."""
    key_variable: str | None = None
    """Name of the environment variable that holds the key, e.g. `JUDGE_API_KEY`; null = no key is sent. The name holds
    KEY, TOKEN, SECRET or PASS: the values of such variables are kept out of logs."""
    at_once: int = Field(default=16, ge=1, le=1024)
    """Responses that it is asked about at a time, and most requests at a time. Source: chosen here: one server of a 30B
    model."""
    request_seconds: float = Field(default=60.0, gt=0)
    """Longest time of one request, seconds. Source: chosen here: a few thousand tokens of reasoning."""
    attempts: int = Field(default=4, ge=1, le=20)
    """Times that a request is sent when the server is busy (429), failing (408, 5xx), slow or unreachable, with longer
    and longer pauses between. Source: chosen here."""

    def read_key(self) -> str | None:
        """Return the key; empty = none is sent, None = its variable is not set."""
        return "" if self.key_variable is None else os.environ.get(self.key_variable, "").strip() or None

    @field_validator("url")
    @classmethod
    def url_is_an_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            parts, is_address = urlsplit(""), False
        if not is_address or parts.query or parts.fragment:
            raise ValueError("url is no address; write http://HOST:PORT/v1")
        if parts.username is not None or parts.password is not None:
            raise ValueError("url holds credentials, which a log would show; set key_variable instead")
        if added := [end for end in ENDPOINTS if parts.path.rstrip("/").endswith(end)]:
            raise ValueError(f"url ends in {added[0]}, which is added to it; leave that out")
        return url.rstrip("/")

    @field_validator("key_variable")
    @classmethod
    def key_variable_is_kept_out_of_logs(cls, name: str | None) -> str | None:
        if name is not None and not (re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and SECRET.search(name)):
            raise ValueError(
                "key_variable names no environment variable for a key; write its name, which holds KEY, TOKEN, SECRET "
                "or PASS, and never the key itself"
            )
        return name
