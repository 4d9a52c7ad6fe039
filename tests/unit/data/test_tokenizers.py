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
from tests.tokenizer_directory import save_tokenizer

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


@pytest.fixture
def hugging_face_directory(tmp_path: Path) -> Path:
    """A byte-level tokenizer with a chat template, and two stop ids in generation_config.json."""
    return save_tokenizer(tmp_path, stop_ids=[256, 257])


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
    assert HuggingFaceTokenizer(hugging_face_directory).stop_ids == (256,)


@pytest.mark.parametrize(
    ("named", "found"),
    [(None, (256,)), (256, (256,)), (257, (256, 257)), ([257, 3], (256, 257, 3)), ([257, 256, 257], (256, 257))],
)
def test_the_tokenizers_eos_and_the_published_ones_stop(tmp_path: Path, named: object, found: tuple[int, ...]) -> None:
    """A tuned model often keeps the base model's generation_config.json."""
    directory = save_tokenizer(tmp_path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert HuggingFaceTokenizer(directory).stop_ids == found


def test_without_a_generation_config_the_model_config_counts(tmp_path: Path) -> None:
    """As in transformers. The directories of tokenizer and model may differ: both count."""
    directory, model = save_tokenizer(tmp_path / "t"), tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text('{"eos_token_id": [257, 3]}')
    section = TokenizerSection(path=directory)
    assert load_tokenizer(section, model).stop_ids == (256, 257, 3)
    (directory / "config.json").write_text('{"eos_token_id": 5}')
    assert load_tokenizer(section, model).stop_ids == (256, 5, 257, 3)
    for place in (directory, model):
        (place / "generation_config.json").write_text("{}")
    assert load_tokenizer(section, model).stop_ids == (256,)


@pytest.mark.parametrize("named", [[], "256", ["256"], -1, [256, -1], 258, 999_999, 1.0, True, [None], [[256]], {}])
def test_a_stop_id_that_is_none_is_refused(tmp_path: Path, named: object) -> None:
    directory = save_tokenizer(tmp_path, stop_ids=named)
    with pytest.raises(RecipeError, match=r"stop-id-wrong\] tokenizer.path: .*generation_config.json: eos_token_id="):
        HuggingFaceTokenizer(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 5000])
def test_a_generation_config_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    directory = save_tokenizer(tmp_path)
    (directory / "generation_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(RecipeError, match=r"stop-id-wrong"):
        HuggingFaceTokenizer(directory)


def test_a_directory_without_any_stop_id_is_refused(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path)
    file = directory / "tokenizer_config.json"
    values = json.loads(file.read_text())
    del values["eos_token"]
    file.write_text(json.dumps(values))
    with pytest.raises(RecipeError, match="stop-id-missing"):
        HuggingFaceTokenizer(directory)


TURNS = {
    "{% for m in messages %}<pad>{{ m.role }}\n{{ m.content }}<pad>\n{% endfor %}": 257,
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}": 256,
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}": None,
    "{% for m in messages %}{{ m.content }}</turn>{% endfor %}": None,
    "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}": None,
}


@pytest.mark.parametrize("template", TURNS)
def test_the_token_that_ends_a_turn_is_read_off_the_template(tmp_path: Path, template: str) -> None:
    end = HuggingFaceTokenizer(save_tokenizer(tmp_path, template)).turn_end()
    assert (end and end[0]) == TURNS[template]


def test_an_id_of_a_row_without_a_token_has_a_text_for_people(tmp_path: Path) -> None:
    """A model has more rows than its tokenizer has tokens, and random weights sample them."""
    hugging_face = HuggingFaceTokenizer(save_tokenizer(tmp_path))
    for tokenizer in (TOKENIZER, hugging_face):
        size = tokenizer.vocab_size
        texts = tokenizer.pieces([size - 1, size, size + 1000])
        assert len(texts) == 3 and all(isinstance(text, str) and text for text in texts)
