"""The section `reward.judge`: the model that a reward of the user's own asks."""

from __future__ import annotations

import inspect
import re
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from gspo_megatron.config.base import Section
from gspo_megatron.config.secret_text import SECRET

PARAMETER = "judge"
"""Name of the parameter by which a reward asks for the judge."""
RESERVED = ("model", "messages", "stream", "n")
"""Fields of a request that are not options."""


class JudgeSection(Section):
    """`reward.judge`: a model behind an OpenAI-style URL, which a reward with a parameter `judge` asks.

    It is reached directly, without a proxy of the site.
    """

    url: str
    """Base address, `http://HOST:PORT/v1`; requests go to `/chat/completions` below it."""
    model: str = Field(min_length=1)
    """Name of the model, as the server knows it."""
    key_variable: str | None = None
    """Name of the environment variable that holds the key, e.g. `JUDGE_API_KEY`; null = no key is sent. The name holds
    KEY, TOKEN, SECRET or PASS: the values of such variables are kept out of logs."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Other fields of each request, passed unchanged: `{temperature: 0, max_tokens: 512}`. Empty = the server's own."""
    at_once: int = Field(default=16, ge=1, le=1024)
    """Responses that are judged at a time, and most requests at a time. Source: chosen here: one server of a 30B
    model."""
    request_seconds: float = Field(default=60.0, gt=0)
    """Longest time of one request, seconds. Source: chosen here: a few thousand tokens of reasoning."""
    attempts: int = Field(default=4, ge=1, le=20)
    """Times that a request is sent when the server is busy (429), failing (408, 5xx), slow or unreachable, with longer
    and longer pauses between. Source: chosen here."""
    prompt_price: float = Field(default=0.0, ge=0)
    """Price of a million prompt tokens, in any currency: the metric `reward/_judge_cost`."""
    answer_price: float = Field(default=0.0, ge=0)
    """Price of a million tokens of the judge's answers."""

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
        if parts.path.rstrip("/").endswith("/chat/completions"):
            raise ValueError("url ends in /chat/completions, which is added to it; leave that out")
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

    @field_validator("options")
    @classmethod
    def options_are_free(cls, options: dict[str, Any]) -> dict[str, Any]:
        if taken := [name for name in options if name in RESERVED]:
            raise ValueError(f"options holds {taken[0]}, which each request sets itself; remove it")
        return options


def asks_judge(reward: Any) -> bool:
    """Whether a reward has a parameter for the judge."""
    try:
        return PARAMETER in inspect.signature(reward).parameters
    except (TypeError, ValueError):
        return False
