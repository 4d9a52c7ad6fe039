"""One interface over SentencePiece and Hugging Face tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from gspo_megatron.config.loading import refuse
from gspo_megatron.config.task_sections import TokenizerSection


class Tokenizer(Protocol):
    """The tokenizer interface of the package. A text is tokenized once; ids are never decoded and tokenized again."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response. The first one ends demonstrations."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids with a meaning, `0..vocab_size-1`. A model may have more rows."""
        ...

    def encode_prompt(self, question: str) -> list[int]:
        """Return the ids of the question in its template, up to the start of the response."""
        ...

    def encode_response(self, text: str) -> list[int]:
        """Return the ids of a whole response, stop id appended."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text within a response, without additions."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of sampled ids without stop ids. Any id is accepted, also one of a model's unused rows."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model with the pieces `<q>` and `<a>`: `<q>` question `<a>` response `</s>`."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=str(path))
        self._path = path
        self.vocab_size: int = self._model.get_piece_size()
        self.stop_ids: tuple[int, ...] = (self._model.eos_id(),)
        self._question, self._answer = (self._piece(piece) for piece in ("<q>", "<a>"))

    def encode_prompt(self, question: str) -> list[int]:
        """Return the ids of `<q>` question `<a>`. Raises ValueError on a character that the vocabulary lacks."""
        return [self._question, *self.encode_text(question), self._answer]

    def encode_response(self, text: str) -> list[int]:
        """Return the ids of the text and `</s>`. Raises ValueError on a character that the vocabulary lacks."""
        return [*self.encode_text(text), *self.stop_ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids. An id without a piece (a model's padding rows can be sampled) becomes the unknown piece."""
        unknown = self._model.unk_id()
        kept = (int(i) for i in ids if i not in self.stop_ids)
        return self._model.decode([i if 0 <= i < self.vocab_size else unknown for i in kept])

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of the text. Raises ValueError on a character that the vocabulary lacks."""
        ids: list[int] = self._model.encode(text)
        if self._model.unk_id() in ids:
            lacking = sorted({char for char in text if self._model.unk_id() in self._model.encode(char)})
            raise ValueError(
                f"{text!r} has characters that {self._path} lacks: {' '.join(lacking)}; train a tokenizer with them"
            )
        return ids

    def _piece(self, piece: str) -> int:
        found = self._model.piece_to_id(piece)
        if found == self._model.unk_id():
            raise refuse(
                "tokenizer-piece-missing",
                "tokenizer.path",
                f"{self._path} has no piece {piece}, which frames a prompt",
                "train it with <q> and <a> as user-defined symbols (tools/train_tokenizer.py)",
            )
        return found


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer directory. Prompts are written by its chat template."""

    def __init__(self, path: Path, system_prompt: str | None = None, enable_thinking: bool | None = None) -> None:
        from transformers import AutoTokenizer

        self._model: Any = AutoTokenizer.from_pretrained(path)
        if not self._model.chat_template:
            raise refuse(
                "chat-template-missing",
                "tokenizer.path",
                f"{path} has no chat template",
                "add chat_template.jinja to the directory",
            )
        self._system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self._options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.vocab_size: int = len(self._model)
        self.stop_ids: tuple[int, ...] = _stop_ids(path, self._model)

    def encode_prompt(self, question: str) -> list[int]:
        """Return the ids of the chat template: the question as the user's turn, then the start of the assistant's."""
        messages = [*self._system, {"role": "user", "content": question}]
        ids = self._model.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False, **self._options
        )
        return [int(i) for i in ids]

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, generation_prompt: bool
    ) -> str:
        """Return the text of the chat template for messages. Raises what the template raises."""
        return self._model.apply_chat_template(
            [*messages],
            tools=tools,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **self._options,
        )

    def encode_response(self, text: str) -> list[int]:
        """Return the ids of the text and the stop id."""
        return [*self.encode_text(text), self.stop_ids[0]]

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of the text. Names of special tokens become special tokens."""
        return self._model.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids. An id outside the vocabulary (a model's padding rows can be sampled) becomes U+FFFD."""
        kept = [int(i) for i in ids if i not in self.stop_ids]
        runs = groupby(kept, key=lambda i: 0 <= i < self.vocab_size)
        return "".join(self._model.decode(list(run)) if known else "\ufffd" * len(list(run)) for known, run in runs)


def load_tokenizer(section: TokenizerSection, model_path: Path | None) -> Tokenizer:
    """Load the tokenizer that a recipe names.

    Args:
        section: `tokenizer` of the recipe.
        model_path: `model.path` of the recipe, used if the section has no path.
    """
    path = section.path or model_path
    if path is None:
        raise refuse(
            "tokenizer-missing",
            "tokenizer.path",
            "is not set and there is no model.path to take it from",
            "set one of them",
        )
    if section.kind == "sentencepiece":
        if not path.is_file():
            raise refuse(
                "tokenizer-missing", "tokenizer.path", f"{path} is not a file", "name a SentencePiece .model file"
            )
        return SentencePieceTokenizer(path)
    if not (path / "tokenizer_config.json").is_file():
        raise refuse(
            "tokenizer-missing",
            "tokenizer.path",
            f"{path} has no tokenizer_config.json",
            "name a Hugging Face model directory",
        )
    return HuggingFaceTokenizer(path, section.system_prompt, section.enable_thinking)


def _stop_ids(path: Path, model: Any) -> tuple[int, ...]:
    """Return the published stop ids. `generation_config.json` comes first: chat models often list several ids there."""
    file = Path(path) / "generation_config.json"
    named = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    found = named if isinstance(named, list) else [named if named is not None else model.eos_token_id]
    if found == [None]:
        raise refuse(
            "stop-id-missing",
            "tokenizer.path",
            f"{path} names no eos token",
            "set eos_token_id in its generation_config.json",
        )
    return tuple(found)
