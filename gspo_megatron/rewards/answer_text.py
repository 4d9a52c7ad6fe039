"""Which part of a response counts: what follows the thinking, and in it the last box."""

from __future__ import annotations

import re

THINK_OPEN, THINK_END = "<think>", "</think>"
"""Around the thinking, as the model families of this package write it."""
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def strip_thinking(text: str, end: str = THINK_END, is_open: bool = False) -> str:
    """Return what follows the thinking of a response; what stands before it if it never ends.

    Args:
        text: of the response.
        end: the text that ends the thinking, as `rollout.thinking.end`.
        is_open: the prompt has opened the thinking already.
    """
    _, found, rest = text.rpartition(end)
    if is_open and not found:
        return ""
    opened = rest.rfind(THINK_OPEN)
    return rest if opened < 0 else rest[:opened]


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends within the thinking, so that the response begins in it."""
    return prompt.rfind(THINK_OPEN) > prompt.rfind(THINK_END)


def find_box(text: str) -> str | None:
    """Return the content of the last `\\boxed{}` that holds something; None without one.

    A last box that is not closed is an empty answer: what stands before it was given up.
    """
    for match in reversed(list(_BOX.finditer(text))):
        content = _read_box(text, match.end())
        if content is None or content.strip():
            return content or ""
    return None


def _read_box(text: str, start: int) -> str | None:
    """The content of a box whose brace is at `start`, None if it is not closed; of `\\boxed 5` the rest of the line."""
    if not text.startswith("{", start):
        return re.split(r"[$\n]|\\[)\]]", text[start:], maxsplit=1)[0]
    depth = 0
    for match in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth and match[0] == "}":
            return text[start + 1 : match.start()]
    return None
