"""Write the tokenizer of the tiny agent recipe: `python tools/make_agent_tokenizer.py [DIRECTORY]`.

A Hugging Face directory with one id for each printable character of ASCII and for each mark of the chat template, which
lies there already. It is deterministic.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models

CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "user\n", "assistant\n",
    '\n{"name": "calculate", "arguments": {"expression": "', '"}}\n',
)  # fmt: skip
"""Parts of the template, and the frame of a call of the calculator."""
PHRASES = ("Calculate ", "What is ", "Solve ", "Compute ", "Evaluate: ", " + ", " - ", " * ", " / ")
"""Parts of a reasoning-gym arithmetic question besides its numbers."""
CHARACTERS = ("\n", *map(chr, range(32, 127)))


def make() -> Tokenizer:
    """Return the tokenizer: 116 ids. A character beyond ASCII is `<|endoftext|>`."""
    vocabulary = {piece: number for number, piece in enumerate((*CONTROLS, *MARKS, *PHRASES, *CHARACTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=CONTROLS[0]))
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in CONTROLS])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in (*MARKS, *PHRASES)])
    return tokenizer


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=Path("recipes/tokenizers/agent"))
    directory: Path = parser.parse_args().directory
    tokenizer = make()
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    print(f"{directory}: {tokenizer.get_vocab_size()} pieces")


if __name__ == "__main__":
    main()
