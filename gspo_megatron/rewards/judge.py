"""A model that judges responses, behind an OpenAI-style URL: a reward asks it and awaits what it says."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gspo_megatron.config.judge_section import JudgeSection
from gspo_megatron.http_clients import direct_session
from gspo_megatron.model_requests import QUOTED, AskAgain, Send, make_headers, quote, request_reply, shorten
from gspo_megatron.rewards.answer_text import strip_thinking

Messages = Sequence[Mapping[str, object]]
"""Chat messages: `[{"role": "user", "content": "..."}]`."""
NAME, PATH = "reward.judge", "/chat/completions"
"""Of its section, and of its requests below the address."""
MOST_BYTES = 4 << 20
"""Of a reply. One beyond it is no chat completion."""
_GRADE = re.compile(
    r"(?:score|grade|rating|verdict)\W{0,5}?[:=]\W{0,5}?(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+(?:\.\d+)?))?(?![\w.,]?\d)",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+(?:\.\d+)?))?\.?")


class JudgeFailed(RuntimeError):
    """The judge gave no verdict. The response has no score and counts as `unscored`."""


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
        self._headers = make_headers(section, NAME)
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

    def __init__(self, section: JudgeSection, post: Send, free: asyncio.Semaphore) -> None:
        self.usage = Usage()
        self._section, self._post, self._free = section, post, free

    async def answer(self, messages: Messages) -> str:
        """Return what the judge says, without its thinking.

        Raises:
            JudgeFailed: no answer after `attempts`, or a refusal that another attempt does not change.
        """
        body = {"model": self._section.model, "messages": list(messages), **self._section.options}
        async with self._free:
            return await request_reply(
                self._section, self._post, PATH, body, self._read, MOST_BYTES, JudgeFailed, self._count_attempt
            )

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
            raise JudgeFailed(f"the answer holds no grade: {shorten(text[-QUOTED:])}")
        grade, scale = (float(part) if part else None for part in match.groups())
        assert grade is not None
        if not lowest <= grade <= highest or scale not in (None, highest):
            raise JudgeFailed(f"the grade {shorten(match[0])} is outside {lowest:g} to {highest:g}")
        return grade

    def parts(self) -> tuple[tuple[str, float], ...]:
        """What was used, as parts of a reward that are measured and not rewarded."""
        used = self.usage
        cost = used.prompt_tokens * self._section.prompt_price + used.answer_tokens * self._section.answer_price
        counted = ((f"_judge_{name}", float(getattr(used, name))) for name in Usage.__slots__)
        return (*counted, ("_judge_cost", cost / 1e6))

    def _read(self, content: bytes) -> str:
        """The text of a chat completion."""
        try:
            value = json.loads(content)
            choice = value["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise AskAgain(f"no chat completion: {quote(content)}") from None
        self._count(value.get("usage"))
        if not isinstance(text, str) or not text.strip():
            reason = choice.get("finish_reason")
            raise JudgeFailed(f"{self._section.url} answered without text (finish_reason={shorten(str(reason))})")
        return strip_thinking(text)

    def _count_attempt(self, attempt: int) -> None:
        self.usage.requests += 1
        self.usage.retries += attempt > 0

    def _count(self, usage: object) -> None:
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
        if len(counts) == 2 and all(isinstance(count, int) and count >= 0 for count in counts):
            self.usage.prompt_tokens += int(counts[0] or 0)
            self.usage.answer_tokens += int(counts[1] or 0)
        else:
            self.usage.unmetered += 1
