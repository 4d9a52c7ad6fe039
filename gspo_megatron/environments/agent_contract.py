"""What a user's own agent gets, and the contract of its form."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How an agent reaches the model: `openai.AsyncOpenAI(base_url=..., api_key=...)`."""

    base_url: str
    """Of the controller's OpenAI-compatible endpoint: `http://127.0.0.1:45123/v1`. Loopback only."""
    api_key: str
    """Names the episode: all requests with it belong to one response. It is valid until the agent returns."""
    model: str
    """Value of `model` in a request."""


def check_agent(found: Any) -> list[str]:
    """Check the form of an agent. Raises ValueError with one fault a line."""
    if inspect.isclass(found) or not callable(found):
        kind = f"the class {found.__name__}" if inspect.isclass(found) else f"a {type(found).__name__}"
        raise ValueError(f"is {kind}; name a function `async def run(problem, client)`")
    call = found if inspect.isroutine(found) else found.__call__
    if not inspect.iscoroutinefunction(call):
        raise ValueError("is not asynchronous; define it with `async def` and await openai.AsyncOpenAI")
    try:
        inspect.signature(found).bind({}, ClientSettings("", "", ""))
    except TypeError as error:
        raise ValueError(f"cannot be called as run(problem, client): {error}; take these two") from None
    return ["takes (problem, client), asynchronous"]
