"""A model that judges responses, behind an OpenAI-style URL: a reward asks it and awaits what it says."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from gspo_megatron.config.judge_section import JudgeSection
from gspo_megatron.config.refusal import refuse
from gspo_megatron.config.secret_text import hide_secrets
from gspo_megatron.http_clients import direct_session
from gspo_megatron.rewards.answer_text import strip_thinking

Post = Callable[..., AbstractAsyncContextManager[Any]]
"""`post` of an aiohttp session."""
Messages = Sequence[Mapping[str, object]]
"""Chat messages: `[{"role": "user", "content": "..."}]`."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the second attempt, and the most before a later one; each pause is twice the one before."""
MOST_BYTES = 4 << 20
"""Of a reply. One beyond it is no chat completion."""
_BUSY = (408, 409, 425, 429)
"""Codes below 500 that mean: again later."""
_QUOTED = 200
_GRADE = re.compile(
    r"(?:score|grade|rating|verdict)\W{0,5}?[:=]\W{0,5}?(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+(?:\.\d+)?))?(?![\w.,]?\d)",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+(?:\.\d+)?))?\.?")


def longest_wait(section: JudgeSection) -> float:
    """Seconds after which one question has an answer or has failed."""
    pauses = sum(1.5 * min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) for attempt in range(section.attempts - 1))
    return section.attempts * (section.request_seconds + LONGEST_PAUSE) + pauses


def read_key(section: JudgeSection) -> str:
    """Return the key of a judge, empty where none is sent. Raises RecipeError for a variable that is not set."""
    name = section.key_variable
    key = os.environ.get(name, "").strip() if name else ""
    if name and not key:
        raise refuse(
            "judge-key-missing", "reward.judge.key_variable",
            f"the environment variable {name} is not set where responses are scored",
            f"export {name}=... before the run is started",
        )  # fmt: skip
    return key


class JudgeFailed(RuntimeError):
    """The judge gave no verdict. The response has no score and counts as `unscored`."""


class _Again(Exception):
    """An attempt failed in a way that another may not. `pause` is what the server asks for, seconds."""

    def __init__(self, fault: str, pause: float = 0.0) -> None:
        super().__init__(fault)
        self.pause = pause


@dataclass(slots=True)
class Usage:
    """What requests used."""

    requests: int = 0
    """Sent, repeated ones included."""
    retries: int = 0
    """Of these, repeated ones."""
    prompt_tokens: int = 0
    """As the server reports them."""
    answer_tokens: int = 0
    """As the server reports them."""
    unmetered: int = 0
    """Replies without a report."""

    def add(self, other: Usage) -> None:
        """Add another's counts."""
        for name in Usage.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Judge:
    """The judge of a recipe. One serves all responses of a process."""

    def __init__(self, section: JudgeSection) -> None:
        """
        Args:
            section: address, model and limits.

        Raises:
            RecipeError: the variable of the key is not set.
        """
        self._section = section
        self._headers = {"Content-Type": "application/json"}
        if key := read_key(section):
            self._headers["Authorization"] = f"Bearer {key}"
        self._free = asyncio.Semaphore(section.at_once)
        self._owed = Usage()
        """Of responses that got no score: the next one's metrics hold it, so that the sum is right."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Inquiry]:
        """The judge for one response."""
        import aiohttp

        limit = aiohttp.ClientTimeout(total=self._section.request_seconds)
        async with direct_session(self._headers, timeout=limit) as session:
            inquiry = Inquiry(self._section, session.post, self._free)
            try:
                yield inquiry
            except BaseException:
                self._owed.add(inquiry.usage)
                raise
        inquiry.usage.add(self._owed)
        self._owed = Usage()


class Inquiry:
    """What a reward gets as `judge`: the judge for one response, which counts what it uses."""

    def __init__(self, section: JudgeSection, post: Post, free: asyncio.Semaphore) -> None:
        self.usage = Usage()
        self._section, self._post, self._free = section, post, free

    async def answer(self, messages: Messages) -> str:
        """Return what the judge says, without its thinking.

        Raises:
            JudgeFailed: no answer after `attempts`, or a refusal that another attempt does not change.
        """
        body = {"model": self._section.model, "messages": list(messages), **self._section.options}
        last = _Again("")
        async with self._free:
            for attempt in range(self._section.attempts):
                self.usage.requests += 1
                self.usage.retries += attempt > 0
                try:
                    return await self._ask(body)
                except _Again as fault:
                    last = fault
                if attempt + 1 < self._section.attempts:
                    usual = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.5)
                    await _pause(max(usual, min(last.pause, LONGEST_PAUSE)))
        raise JudgeFailed(f"{self._section.url} gave no answer in {self._section.attempts} attempts; the last: {last}")

    async def grade(self, messages: Messages, lowest: float, highest: float) -> float:
        """Return the grade that the judge gives.

        It is the last number in its answer after "score", "grade", "rating" or "verdict" and a colon, as in
        `Score: 7` or `{"score": 7}`; or the whole answer. Ask for it in the messages.

        Raises:
            JudgeFailed: there is none, or it is outside `lowest` to `highest`.
        """
        text = await self.answer(messages)
        found = list(_GRADE.finditer(text))
        match = found[-1] if found else _NUMBER.fullmatch(text.strip())
        if match is None:
            raise JudgeFailed(f"the answer holds no grade: {_shorten(text[-_QUOTED:])}")
        grade, scale = (float(part) if part else None for part in match.groups())
        assert grade is not None
        if not lowest <= grade <= highest or scale not in (None, highest):
            raise JudgeFailed(f"the grade {_shorten(match[0])} is outside {lowest:g} to {highest:g}")
        return grade

    def parts(self) -> tuple[tuple[str, float], ...]:
        """What was used, as parts of a reward that are measured and not rewarded."""
        used = self.usage
        cost = used.prompt_tokens * self._section.prompt_price + used.answer_tokens * self._section.answer_price
        counted = ((f"_judge_{name}", float(getattr(used, name))) for name in Usage.__slots__)
        return (*counted, ("_judge_cost", cost / 1e6))

    async def _ask(self, body: Mapping[str, object]) -> str:
        """One attempt. Raises _Again or JudgeFailed."""
        import aiohttp

        try:
            # The key goes to this address only.
            url = f"{self._section.url}/chat/completions"
            async with self._post(url, json=body, allow_redirects=False) as reply:
                content = bytearray()
                async for part in reply.content.iter_chunked(1 << 16):
                    content += part
                    if len(content) > MOST_BYTES:
                        raise _Again(f"a reply of more than {MOST_BYTES >> 20} MiB")
        except TimeoutError:
            raise _Again(f"no reply within {self._section.request_seconds:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Again(_shorten(f"{type(error).__name__}: {error}")) from None
        if reply.status in _BUSY or reply.status >= 500:
            raise _Again(f"HTTP {reply.status} {_quote(content)}", _read_pause(reply.headers.get("Retry-After", "")))
        if reply.status != 200:
            raise JudgeFailed(f"{self._section.url} answered HTTP {reply.status} {_quote(content)}")
        return self._read(bytes(content))

    def _read(self, content: bytes) -> str:
        """The text of a chat completion."""
        try:
            value = json.loads(content)
            choice = value["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _Again(f"no chat completion: {_quote(content)}") from None
        self._count(value.get("usage"))
        if not isinstance(text, str) or not text.strip():
            reason = choice.get("finish_reason")
            raise JudgeFailed(f"{self._section.url} answered without text (finish_reason={_shorten(str(reason))})")
        return strip_thinking(text)

    def _count(self, usage: object) -> None:
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
        if len(counts) == 2 and all(isinstance(count, int) and count >= 0 for count in counts):
            self.usage.prompt_tokens += int(counts[0] or 0)
            self.usage.answer_tokens += int(counts[1] or 0)
        else:
            self.usage.unmetered += 1


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


def _read_pause(text: str) -> float:
    """Seconds of a `Retry-After`; 0 for a date and for anything else."""
    return float(text) if re.fullmatch(r"\d{1,6}(\.\d+)?", text.strip()) else 0.0


def _quote(content: bytes | bytearray) -> str:
    return _shorten(bytes(content[: 4 * _QUOTED]).decode(errors="replace"))


def _shorten(text: str) -> str:
    """A text of others' for an error: one line, short, without secrets."""
    return " ".join(hide_secrets(text).split())[:_QUOTED]
