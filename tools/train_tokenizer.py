"""Train the character tokenizer of the tiny recipes: `python tools/train_tokenizer.py [OUTPUT]`.

It is deterministic: the corpus is in this file, so the same SentencePiece gives the same pieces. There are 93 pieces:
3 control pieces, 12 marks and phrases, and 78 characters. The tiny model pads them to 96 rows.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import sentencepiece

SPACE = "\u2581"
"""SentencePiece's character for a space. A user-defined piece with a plain space never matches, without a warning."""

CONTROLS = ("<unk>", "</s>", "<pad>")
MARKS = ("<q>", "<a>", "<|work|>")
"""Start of a question, of a response, and of worked columns."""
PHRASES = ("Calculate ", "What is ", "Solve ", "Compute ", "Evaluate: ", " + ", " - ", " * ", " / ")
"""Parts of a reasoning-gym arithmetic question besides its numbers."""
CHARACTERS = " 0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;?!'\"+-*/=()"

NUM_PIECES = len(CONTROLS) + len(MARKS) + len(PHRASES) + len(CHARACTERS)


def corpus() -> list[str]:
    """Return prefixes of the character list. Each character occurs more often than the next; this orders them."""
    return [CHARACTERS[: index + 1] for index in range(len(CHARACTERS))]


def train() -> bytes:
    """Train and return the serialized SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="char",
        vocab_size=NUM_PIECES,
        character_coverage=1.0,
        user_defined_symbols=[*MARKS, *(phrase.replace(" ", SPACE) for phrase in PHRASES)],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        eos_id=1,
        pad_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main() -> None:
    """Train and write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=Path("recipes/tokenizers/arithmetic.model"))
    output: Path = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(train())
    print(f"{output}: {NUM_PIECES} pieces")


if __name__ == "__main__":
    main()
