"""The files of a tokenizer in a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of a tokenizer, whatever its class; beside them `*.tiktoken`, and modules that it brings along."""
TEMPLATES = ("additional_chat_templates",)
"""Folders of it."""
PATTERNS = ("*.tiktoken", "tokenization_*.py")
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIG = "config.json"
"""transformers takes the stop ids from there where there is no generation config."""


def tokenizer_files(directory: Path) -> list[Path]:
    """Files of the tokenizer in a directory; those in its folders are left to `tokenizer_folders`."""
    named = [directory / name for name in TOKENIZER_FILES]
    found = [*named, *(file for pattern in PATTERNS for file in sorted(directory.glob(pattern)))]
    return [file for file in found if file.is_file()]


def tokenizer_folders(directory: Path) -> list[Path]:
    """Folders that belong to the tokenizer in a directory."""
    return [directory / name for name in TEMPLATES if (directory / name).is_dir()]


def stop_file(directory: Path) -> Path:
    """Return the file of a directory that names its stop ids; it need not exist."""
    file = directory / GENERATION_CONFIG
    return file if file.exists() else directory / MODEL_CONFIG
