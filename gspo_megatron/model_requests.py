"""Requests to a model server of the user's (`reward.judge`, `teacher`): attempts, pauses, refusals, limits."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from gspo_megatron.config.model_server import ModelServerSection
from gspo_megatron.config.refusal import refuse
from gspo_megatron.config.secret_text import hide_secrets

Send = Callable[..., AbstractAsyncContextManager[Any]]
"""`post` or `get` of an aiohttp session."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the second attempt, and the most before a later one; each pause is twice the one before."""
QUOTED = 200
"""Characters of a server's words in an error."""
_BUSY = (408, 409, 425, 429)
"""Codes below 500 that mean: again later."""


class AskAgain(Exception):
    """An attempt failed in a way that another may not. `pause` is what the server asks for, seconds."""

    def __init__(self, fault: str, pause: float = 0.0) -> None:
        super().__init__(fault)
        self.pause = pause


def longest_wait(section: ModelServerSection) -> float:
    """Seconds after which one question has an answer or has failed."""
    pauses = sum(1.5 * min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) for attempt in range(section.attempts - 1))
    return section.attempts * (section.request_seconds + LONGEST_PAUSE) + pauses


def make_headers(section: ModelServerSection, name: str) -> dict[str, str]:
    """The headers of every request, the key among them if the recipe names one.

    Args:
        section: names the variable of the key.
        name: of the section in the recipe: `reward.judge`.

    Raises:
        RecipeError: the variable is not set.
    """
    key, variable = section.read_key(), section.key_variable
    if key is None:
        raise refuse(
            f"{name.rpartition('.')[2]}-key-missing", f"{name}.key_variable",
            f"the environment variable {variable} is not set where responses are scored",
            f"export {variable}=... before the run is started",
        )  # fmt: skip
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


async def request_reply[T](
    section: ModelServerSection,
    send: Send,
    path: str,
    body: Mapping[str, object] | None,
    read: Callable[[bytes], T],
    most_bytes: int,
    failure: type[Exception],
    count: Callable[[int], None] = lambda attempt: None,
) -> T:
    """Ask a server, again where that may help; what `read` makes of its reply.

    Args:
        section: address and limits.
        send: of a session that sends the headers and has the time limit.
        path: below the address.
        body: as JSON; None = none.
        read: of the bytes of a reply. It raises AskAgain for one that another attempt may better, or `failure`.
        most_bytes: of a reply; one beyond it is none.
        failure: what is raised, with one sentence.
        count: called with the number of each attempt, from 0.

    Raises:
        failure: no reply after `attempts`, or a refusal that another attempt does not change.
    """
    last = AskAgain("")
    for attempt in range(section.attempts):
        count(attempt)
        try:
            return read(await _attempt(section, send, path, body, most_bytes, failure))
        except AskAgain as fault:
            last = fault
        if attempt + 1 < section.attempts:
            usual = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.5)
            await _pause(max(usual, min(last.pause, LONGEST_PAUSE)))
    raise failure(f"{section.url} gave no answer in {section.attempts} attempts; the last: {last}")


async def _attempt(
    section: ModelServerSection,
    send: Send,
    path: str,
    body: Mapping[str, object] | None,
    most_bytes: int,
    failure: type[Exception],
) -> bytes:
    """The bytes of a reply. Raises AskAgain or `failure`."""
    import aiohttp

    content = bytearray()
    try:
        # The key goes to this address only.
        async with send(f"{section.url}{path}", json=body, allow_redirects=False) as reply:
            async for part in reply.content.iter_chunked(1 << 16):
                content += part
                if len(content) > most_bytes:
                    raise AskAgain(f"a reply of more than {most_bytes >> 20} MiB")
    except TimeoutError:
        raise AskAgain(f"no reply within {section.request_seconds:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise AskAgain(shorten(f"{type(error).__name__}: {error}")) from None
    if reply.status in _BUSY or reply.status >= 500:
        raise AskAgain(f"HTTP {reply.status} {quote(content)}", _read_pause(reply.headers.get("Retry-After", "")))
    if reply.status != 200:
        raise failure(f"{section.url} answered HTTP {reply.status} {quote(content)}")
    return bytes(content)


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


def _read_pause(text: str) -> float:
    """Seconds of a `Retry-After`; 0 for a date and for anything else."""
    return float(text) if re.fullmatch(r"\d{1,6}(\.\d+)?", text.strip()) else 0.0


def quote(content: bytes | bytearray) -> str:
    """The beginning of a server's reply for an error."""
    return shorten(bytes(content[: 4 * QUOTED]).decode(errors="replace"))


def shorten(text: str) -> str:
    """A text of others' for an error: one line, short, without secrets."""
    return " ".join(hide_secrets(text).split())[:QUOTED]
