"""A SentencePiece model with `<q>` and `<a>` as the files that transformers and vLLM read.

The pieces become a fast tokenizer, and the frame `<q>` question `<a>` response `</s>` a chat template. A fast
tokenizer may not follow every normalisation; so the two are compared, and a model that would be read otherwise is
refused instead of written.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from gspo_megatron.config.loading import refuse

SPACE = "\u2581"
FRAME = ("<q>", "<a>")
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<q>{{ message['content'] }}<a>"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant') }}{% endif %}{% endfor %}"
)
CONTROL, USER_DEFINED = 3, 4
"""SentencePiece's numbers of two types of pieces."""
COMPARED = 2000
"""Random texts on which the two must agree."""


def write_sentencepiece(source: Path, directory: Path) -> dict[str, Any]:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja for a SentencePiece model.

    Returns:
        What the generation config holds besides the stop ids.

    Raises:
        RecipeError: a fast tokenizer gives other ids for some text; the sentence shows it.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    proto = messages.ModelProto.FromString(source.read_bytes())
    fast, model = _build(proto), SentencePieceProcessor(model_file=str(source))
    _compare(fast, model, source)
    fast.save(str(directory / "tokenizer.json"))
    special = {"eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id(), "bos": model.bos_id()}
    named = {f"{name}_token": model.id_to_piece(number) for name, number in special.items() if number >= 0}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return {f"{name}_token_id": special[name] for name in ("pad", "bos") if special[name] >= 0}


def _build(proto: Any) -> Any:
    """A fast tokenizer of the same pieces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    trained, spec = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    numbers = {piece: number for number, (piece, _) in enumerate(pieces)}
    kind = trained.model_type
    if kind == trained.UNIGRAM:
        fast = Tokenizer(models.Unigram(pieces, trained.unk_id, trained.byte_fallback))
    else:
        merges = [] if kind == trained.CHAR else _merges(numbers, dict(pieces))
        fast = Tokenizer(models.BPE(
            numbers, merges, unk_token=trained.unk_piece, fuse_unk=True, byte_fallback=trained.byte_fallback
        ))  # fmt: skip
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        from tokenizers import Regex

        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else [])
    )
    fast.add_tokens([
        AddedToken(piece.piece, normalized=piece.type == USER_DEFINED and piece.piece not in FRAME,
                   special=piece.type == CONTROL or piece.piece in FRAME)
        for piece in proto.pieces if piece.type in (CONTROL, USER_DEFINED)
    ])  # fmt: skip
    return fast


def _merges(numbers: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    from transformers.convert_slow_tokenizer import generate_merges

    return generate_merges(numbers, scores)


def _compare(fast: Any, model: Any, source: Path) -> None:
    """Encode every piece, and random texts of pieces, both ways."""
    generator = random.Random(0)
    words = [
        model.id_to_piece(number).replace(SPACE, " ") for number in range(model.get_piece_size())
        if not (model.is_control(number) or model.is_unknown(number) or model.is_byte(number))
    ]  # fmt: skip
    words = [word for word in words if word not in FRAME]
    texts = words[:COMPARED] + ["".join(generator.choices(words, k=generator.randint(1, 12))) for _ in range(COMPARED)]
    for text in texts:
        ours = [model.piece_to_id("<q>"), *model.encode(text), model.piece_to_id("<a>")]
        theirs = fast.encode(f"<q>{text}<a>", add_special_tokens=False).ids
        if ours != theirs:
            raise refuse(
                "tokenizer-not-written", "tokenizer.path",
                f"{source} as a Hugging Face tokenizer reads {text!r} as {theirs} and not as {ours}",
                "the weights are written without a tokenizer; put one of your own beside them",
            )  # fmt: skip
