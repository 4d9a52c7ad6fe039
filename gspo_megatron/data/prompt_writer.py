"""A problem as the ids of its prompt: by the chat template, or by a user's own rendering."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gspo_megatron.config.hooks import load_hook
from gspo_megatron.config.plugins import describe_fault
from gspo_megatron.config.task_sections import TokenizerSection
from gspo_megatron.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from gspo_megatron.types import Problem


@dataclass(frozen=True, slots=True)
class Chat:
    """What a user's rendering is given beside the line."""

    messages: list[dict[str, Any]]
    """What the chat template would be given: `tokenizer.system_prompt`, then the line's own messages."""
    tools: list[dict[str, Any]]
    """The line's tools; empty = none."""
    tokenizer: Tokenizer
    """The tokenizer of the recipe."""

    def apply(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str:
        """Return the chat template's text of messages, up to the start of the assistant's turn. Raises ValueError."""
        if not isinstance(self.tokenizer, HuggingFaceTokenizer):
            raise ValueError("a sentencepiece tokenizer has no chat template; return a text")
        return self.tokenizer.render(messages, tools or None, generation_prompt=True)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Names of special tokens become special tokens."""
        return self.tokenizer.encode_text(text)


class PromptWriter:
    """Writes the prompts of a recipe."""

    def __init__(self, section: TokenizerSection, tokenizer: Tokenizer) -> None:
        """Take a tokenizer. Raises RecipeError for a `tokenizer.rendering` that is none."""
        self._tokenizer, self._system = tokenizer, section.system_prompt
        self._render = load_hook("rendering", section.rendering) if section.rendering else None

    def encode(self, problem: Problem) -> list[int]:
        """Return the ids of a prompt. Raises ValueError with a sentence for a problem that cannot be written."""
        if self._render is None:
            if problem.messages:
                return self._tokenizer.encode_messages(problem.messages, problem.tools)
            return self._tokenizer.encode_prompt(problem.question)
        messages = problem.messages or ({"role": "user", "content": problem.question},)
        if self._system is not None and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": self._system}, *messages)
        chat = Chat([dict(message) for message in messages], list(problem.tools), self._tokenizer)
        return encode_own(self._render, problem.line, chat)


def encode_own(render: Any, line: dict[str, Any], chat: Chat) -> list[int]:
    """Return the ids of what a user's rendering makes of a line. Raises ValueError with a sentence."""
    try:
        made = render(line, chat)
    # The code is the user's own and may raise anything.
    except (Exception, SystemExit) as error:
        raise ValueError(f"the rendering raised {describe_fault(error)}") from None
    if isinstance(made, str):
        if made.encode("utf-8", "replace") != made.encode("utf-8", "surrogatepass"):
            raise ValueError("the rendering returned half of a surrogate pair; return characters")
        return _need_ids(chat.encode(made), chat.tokenizer)
    if isinstance(made, list | tuple) and made and all(isinstance(one, dict) for one in made):
        return _need_ids(chat.encode(chat.apply(made, chat.tools)), chat.tokenizer)
    if isinstance(made, list | tuple):
        return _need_ids(made, chat.tokenizer)
    raise ValueError(f"the rendering returned a {type(made).__name__}; return a text, a list of ids or of messages")


def _need_ids(ids: Sequence[Any], tokenizer: Tokenizer) -> list[int]:
    if not ids:
        raise ValueError("the rendering returned nothing; return a prompt of at least one token")
    for one in ids:
        if isinstance(one, bool) or not hasattr(one, "__index__"):
            raise ValueError(f"the rendering returned a list with {one!r}; return ids or messages, not both")
        if not 0 <= int(one) < tokenizer.vocab_size:
            raise ValueError(f"the rendering returned the id {int(one)}, the vocabulary has {tokenizer.vocab_size}")
    return [int(one) for one in ids]


def check_rendering(found: Any) -> list[str]:
    """Check the form of a user's rendering: the contract of the hook. Raises ValueError with one fault a line."""
    if inspect.isclass(found) or not callable(found):
        what = f"the class {found.__name__}" if inspect.isclass(found) else f"a {type(found).__name__}"
        raise ValueError(f"is {what}; name a function render(line, chat)")
    call = found if inspect.isroutine(found) else found.__call__
    if any(test(call) for test in (inspect.isgeneratorfunction, inspect.iscoroutinefunction)):
        raise ValueError("is a generator or `async def`; return the prompt from a plain function")
    try:
        inspect.signature(found).bind({}, None)
    except TypeError as error:
        raise ValueError(f"cannot be called as render(line, chat): {error}; take these two") from None
    except ValueError:
        pass  # no signature to look at
    return ["takes (line, chat)"]


SAMPLE_LINES: tuple[dict[str, Any], ...] = (
    {"prompt": "What is 1 + 1?", "answer": "2"},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}],
     "answer": "2"},
)  # fmt: skip
"""A text, and a conversation."""


class _ByteTokenizer:
    """Bytes as ids: enough of a tokenizer to try a rendering without a model."""

    stop_ids = (256,)
    vocab_size = 257

    def encode_prompt(self, question: str) -> list[int]:
        return self.encode_text(question)

    def encode_messages(self, messages: Sequence[Any], tools: Sequence[Any] = ()) -> list[int]:
        return self.encode_text("".join(f"[{message['role']}]{message['content']}" for message in messages))

    def encode_response(self, text: str) -> list[int]:
        return [*self.encode_text(text), 256]

    def encode_text(self, text: str) -> list[int]:
        return [*text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(one for one in ids if one < 256).decode(errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.decode([one]) for one in ids]


class _SampleChat(Chat):
    """A chat whose template writes `[role]content`."""

    def apply(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str:
        return "".join(f"[{message['role']}]{message['content']}" for message in messages) + "[assistant]"


def try_rendering(found: Any, samples: object = None) -> list[str]:
    """Call a user's rendering with two sample lines. Raises ValueError with one fault a line."""
    lengths = []
    for sample in SAMPLE_LINES:
        line = copy.deepcopy(sample)
        messages = line["prompt"] if isinstance(line["prompt"], list) else [{"role": "user", "content": line["prompt"]}]
        chat = _SampleChat(copy.deepcopy(messages), [], _ByteTokenizer())
        ids = encode_own(found, line, chat)
        if line != sample:
            raise ValueError("changed the line, which the reward is given too; copy it first")
        if ids != encode_own(found, line, _SampleChat(copy.deepcopy(messages), [], _ByteTokenizer())):
            raise ValueError("returned another prompt for the same line; a resumed run must find the same")
        lengths.append(len(ids))
    return [f"wrote a text and a conversation as prompts of {lengths[0]} and {lengths[1]} bytes"]
