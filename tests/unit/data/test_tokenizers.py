"""The shipped SentencePiece model and the Hugging Face adapter behind one interface."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.task_sections import TokenizerSection
from gspo_megatron.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from tests.places import ROOT

SHIPPED = ROOT / "recipes/tokenizers/arithmetic.model"
TOKENIZER = SentencePieceTokenizer(SHIPPED)


def test_a_question_takes_eleven_tokens() -> None:
    """`<q>`, `Calculate `, 3 digits, ` + `, 3 digits, `.`, `<a>`: the whole-word pieces match, spaces and all."""
    ids = TOKENIZER.encode_prompt("Calculate 879 + 974.")
    assert len(ids) == 1 + 1 + 3 + 1 + 3 + 1 + 1
    assert TOKENIZER.decode(ids) == "<q>Calculate 879 + 974.<a>"


def test_a_worked_answer_takes_twenty_one_tokens() -> None:
    ids = TOKENIZER.encode_response("<|work|>9413,7715,8918=1853")
    assert len(ids) == 21
    assert ids[-1] == TOKENIZER.stop_ids[0]
    assert TOKENIZER.decode(ids) == "<|work|>9413,7715,8918=1853"


def test_the_vocabulary_has_93_pieces() -> None:
    assert TOKENIZER.vocab_size == 93


@given(st.lists(st.integers(min_value=-1, max_value=10**6)))
def test_any_ids_decode(ids: list[int]) -> None:
    """A model's padded rows (93, 94, 95 here) can be sampled."""
    assert isinstance(TOKENIZER.decode(ids), str)


def test_an_id_outside_the_vocabulary_is_not_lost() -> None:
    assert TOKENIZER.decode([*TOKENIZER.encode_response("12")[:-1], 95]) != "12"


def test_a_character_the_vocabulary_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"lacks: \[ \]"):
        TOKENIZER.encode_prompt("Solve [3].")


def test_the_training_script_gives_the_shipped_pieces() -> None:
    spec = importlib.util.spec_from_file_location("train_tokenizer", ROOT / "tools/train_tokenizer.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    from sentencepiece import SentencePieceProcessor

    again, shipped = SentencePieceProcessor(model_proto=script.train()), SentencePieceProcessor(model_file=str(SHIPPED))
    assert [again.id_to_piece(i) for i in range(93)] == [shipped.id_to_piece(i) for i in range(93)]


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tokenizer.path: .*nowhere.model is not a file"):
        load_tokenizer(TokenizerSection(kind="sentencepiece", path=tmp_path / "nowhere.model"), None)
    with pytest.raises(RecipeError, match=r"has no tokenizer_config.json"):
        load_tokenizer(TokenizerSection(), tmp_path)
    with pytest.raises(RecipeError, match=r"no model.path to take it from"):
        load_tokenizer(TokenizerSection(), None)


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<nothink>{% endif %}{% endif %}"
)


@pytest.fixture
def hugging_face_directory(tmp_path: Path) -> Path:
    """A byte-level tokenizer with 256 + 2 ids, a chat template, and two stop ids in generation_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE)
    made.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 257]}))
    return tmp_path


def test_hugging_face_prompt_and_answer(hugging_face_directory: Path) -> None:
    tokenizer = HuggingFaceTokenizer(hugging_face_directory, system_prompt="Be brief.", enable_thinking=False)
    assert tokenizer.decode(tokenizer.encode_prompt("2 + 2?")) == "[system]Be brief.[user]2 + 2?[assistant]<nothink>"
    assert tokenizer.stop_ids == (256, 257)
    answer = tokenizer.encode_response("4")
    assert answer[-1] == 256
    assert tokenizer.decode([*answer, 257]) == "4"


def test_hugging_face_switches_are_passed_only_when_set(hugging_face_directory: Path) -> None:
    tokenizer = load_tokenizer(TokenizerSection(), hugging_face_directory)
    assert tokenizer.decode(tokenizer.encode_prompt("2 + 2?")) == "[user]2 + 2?[assistant]"


def test_hugging_face_decodes_rows_without_a_token(hugging_face_directory: Path) -> None:
    tokenizer = HuggingFaceTokenizer(hugging_face_directory)
    four = tokenizer.encode_response("4")[:-1]
    assert tokenizer.decode([*four, 300, 301, *four]) == "4\ufffd\ufffd4"


def test_hugging_face_without_generation_config_stops_at_the_tokenizers_eos(hugging_face_directory: Path) -> None:
    (hugging_face_directory / "generation_config.json").unlink()
    assert len(HuggingFaceTokenizer(hugging_face_directory).stop_ids) == 1
