"""A small Hugging Face tokenizer directory for tests: bytes as tokens, two names of special tokens, a chat template."""

from __future__ import annotations

import json
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<nothink>{% endif %}{% endif %}"
)
END, PAD, VOCABULARY = 256, 257, 258


def save_tokenizer(directory: Path, template: str | None = TEMPLATE, stop_ids: object = None) -> Path:
    """Save a byte-level tokenizer of 256 + 2 ids with `<end>` as eos.

    Args:
        directory: made if it is not there.
        template: chat template; None = none.
        stop_ids: `eos_token_id` of a generation_config.json; None = no such file.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<pad>", chat_template=template)
    made.save_pretrained(directory)
    if stop_ids is not None:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids}))
    return directory
