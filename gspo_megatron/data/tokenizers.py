"""One interface over SentencePiece and Hugging Face tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gspo_megatron.config.loading import refuse
from gspo_megatron.config.task_sections import TokenizerSection
from gspo_megatron.data.stop_ids import read_stop_ids

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Any of them makes a Hugging Face directory that of a tokenizer."""


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

    def encode_messages(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[int]:
        """Return the ids of a conversation, up to the start of the response. Raises ValueError."""
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

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each id of a prompt, for people; the name of a token that is a part of a character."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model with the pieces `<q>` and `<a>`: `<q>` question `<a>` response `</s>`."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            fix = "name a SentencePiece .model file"
            raise refuse("tokenizer-broken", "tokenizer.path", f"{path} cannot be loaded ({reason})", fix) from None
        self._path = path
        self.vocab_size: int = self._model.get_piece_size()
        if self._model.eos_id() < 0:
            fix = "train it with an eos piece (tools/train_tokenizer.py)"
            raise refuse("stop-id-missing", "tokenizer.path", f"{path} has no eos piece: no response would stop", fix)
        self.stop_ids: tuple[int, ...] = (self._model.eos_id(),)
        self._question, self._answer = (self._piece(piece) for piece in ("<q>", "<a>"))

    def encode_prompt(self, question: str) -> list[int]:
        """Return the ids of `<q>` question `<a>`. Raises ValueError on a character that the vocabulary lacks."""
        return [self._question, *self.encode_text(question), self._answer]

    def encode_messages(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[int]:
        """Raise ValueError: these models know a question and its response."""
        raise ValueError("is a conversation, and a sentencepiece tokenizer has no chat template to write it")

    def encode_response(self, text: str) -> list[int]:
        """Return the ids of the text and `</s>`. Raises ValueError on a character that the vocabulary lacks."""
        return [*self.encode_text(text), *self.stop_ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids. An id without a piece (a model's padding rows can be sampled) becomes the unknown piece."""
        kept = (int(i) for i in ids if i not in self.stop_ids)
        return self._model.decode([i if 0 <= i < self.vocab_size else self._model.unk_id() for i in kept])

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of the text. Raises ValueError on a character that the vocabulary lacks."""
        ids: list[int] = self._model.encode(text)
        if self._model.unk_id() in ids:
            lacking = sorted({char for char in text if self._model.unk_id() in self._model.encode(char)})
            raise ValueError(
                f"{text!r} has characters that {self._path} lacks: {' '.join(lacking)}; train a tokenizer with them"
            )
        return ids

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return each piece, its blanks as blanks; the unknown one for an id without."""
        known = (one if 0 <= one < self.vocab_size else self._model.unk_id() for one in ids)
        return [self._model.id_to_piece(one).replace("\u2581", " ") for one in known]

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

    def __init__(
        self,
        path: Path,
        system_prompt: str | None = None,
        enable_thinking: bool | None = None,
        needs_template: bool = True,
        model_path: Path | None = None,
    ) -> None:
        """Load a directory.

        Args:
            path: of the tokenizer.
            system_prompt: content of a first message that conversations without a system message get.
            enable_thinking: given to the template; None = not given.
            needs_template: whether a directory without a chat template is refused.
            model_path: of the model, which names stop ids too; None = the same directory.

        Raises:
            RecipeError: it cannot be used.
        """
        self._model = _load_directory(path)
        if needs_template and not self._model.chat_template:
            raise refuse(
                "chat-template-missing",
                "tokenizer.path",
                f"{path} has no chat template",
                "add chat_template.jinja to the directory, or set tokenizer.rendering",
            )
        self._system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self._options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        known = self._model.get_vocab().values()
        self.vocab_size: int = max(known, default=-1) + 1
        self.stop_ids: tuple[int, ...] = read_stop_ids(path, self._model.eos_token_id, known, model_path)

    def encode_prompt(self, question: str) -> list[int]:
        """Return the ids of the chat template: the question as the user's turn, then the start of the assistant's.

        Raises:
            ValueError: the template refuses it; with the template's own words.
        """
        return self.encode_messages([{"role": "user", "content": question}], ())

    def encode_messages(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[int]:
        """Return the ids of a conversation. Its own system message comes before `tokenizer.system_prompt`.

        Raises:
            ValueError: the template refuses it; with the template's own words.
        """
        return self.encode_text(self.write_prompt(messages, tools))

    def write_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> str:
        """Return the text of a conversation as `encode_messages` takes it, and raise as it does."""
        system = [] if messages and messages[0]["role"] == "system" else self._system
        return self.render([*system, *messages], tools or None, generation_prompt=True)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, generation_prompt: bool
    ) -> str:
        """Return the text of the chat template for messages. Raises as `encode_prompt`."""
        return self._write(messages, tools=tools, add_generation_prompt=generation_prompt, **self._options)

    def _write(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        options = {"add_generation_prompt": True, **options}
        if not self._model.chat_template:
            raise ValueError("the tokenizer has no chat template; add chat_template.jinja to its directory")
        try:
            text = self._model.apply_chat_template([*messages], tokenize=False, **options)
        # A template is a program of its author's: it may raise anything, by design or by mistake.
        except Exception as error:
            roles = ", ".join(message["role"] for message in messages)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template refuses messages of {roles}: {reason}") from None
        if not isinstance(text, str):
            raise ValueError(f"the chat template gives a {type(text).__name__} and no text")
        return text

    def unused_settings(self) -> list[str]:
        """Return the keys of `tokenizer` that are set and not read by the template. Raises as `encode_prompt`."""
        question = [{"role": "user", "content": "1 + 1?"}]
        unused = []
        for message in self._system:
            other = {**message, "content": f"{message['content']} (other)"}
            if self._write([message, *question]) == self._write([other, *question]):
                unused.append("system_prompt")
        if self._options:
            with_it, without = (self._write([*self._system, *question], enable_thinking=on) for on in (True, False))
            unused += ["enable_thinking"] if with_it == without else []
        return unused

    def turn_end(self) -> tuple[int | None, str] | None:
        """Return what ends an assistant's turn in the template: a token's id and name, or None and `<...>` that is no
        token; None = nothing of the kind."""
        answer = "an answer"
        messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": answer}]
        try:
            text = self.render([*self._system, *messages], None, generation_prompt=False)
        except ValueError:
            return None  # a template of one turn
        _, found, rest = text.rpartition(answer)
        rest = rest.strip() if found else ""
        ids = self.encode_text(rest) if rest else []
        # A token of its own, and not the first piece of a text: `<|im_end|>`, not `\n`.
        if ids and ids[0] in self._model.added_tokens_decoder:
            return ids[0], self._model.convert_ids_to_tokens(ids[:1])[0]
        return (None, rest[: rest.index(">") + 1]) if rest.startswith("<") and ">" in rest else None

    def encode_response(self, text: str) -> list[int]:
        """Return the ids of the text and the stop id."""
        return [*self.encode_text(text), self.stop_ids[0]]

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of the text. Names of special tokens become special tokens."""
        return self._model.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids. An id outside the vocabulary (a model's padding rows can be sampled) becomes U+FFFD."""
        every = np.asarray(ids, np.int64)  # transformers looks at every number of a list, and takes an array as it is
        kept = every[~np.isin(every, self.stop_ids)]
        known = (kept >= 0) & (kept < self.vocab_size)
        borders = np.flatnonzero(known[1:] != known[:-1]) + 1
        runs = zip(np.split(kept, borders), np.split(known, borders), strict=True)
        return "".join(self._model.decode(run) if said.all() else "\ufffd" * len(run) for run, said in runs)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each id, or the token's name where its bytes are no whole characters, or U+FFFD."""
        texts = [self._model.decode([one]) for one in ids]
        names = [name or "\ufffd" for name in self._model.convert_ids_to_tokens(list(ids))]
        return [name if not text or "\ufffd" in text else text for text, name in zip(texts, names, strict=True)]


def _load_directory(path: Path) -> Any:
    """Load a directory as transformers does, from its files alone. Raises RecipeError with the library's words."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # A broken file shows as an exception of whichever library met it first.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        fix = "save the tokenizer by save_pretrained, or name another directory"
        raise refuse("tokenizer-broken", "tokenizer.path", f"{path} cannot be loaded ({reason})", fix) from None


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
    lacking = "" if (path / "tokenizer_config.json").is_file() else "tokenizer_config.json"
    if not lacking and not any((path / name).is_file() for name in VOCABULARY_FILES):
        # transformers makes an empty tokenizer of such a directory, without a word.
        lacking = f"vocabulary ({', '.join(VOCABULARY_FILES)})"
    if lacking:
        raise refuse(
            "tokenizer-missing",
            "tokenizer.path",
            f"{path} has no {lacking}",
            "name a Hugging Face model directory with its tokenizer",
        )
    needs_template = section.rendering is None
    return HuggingFaceTokenizer(path, section.system_prompt, section.enable_thinking, needs_template, model_path)
