"""A model that a run leaves behind: transformers and a plain vLLM server chat with it, and say the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.models import load_recipe
from tests.places import ROOT
from tests.rollout.plain_server import NAME, plain_server, write_random_model
from tests.waiting import HANG

pytestmark = pytest.mark.timeout(600)
QUESTION = "What is 12 + 30?"
RECIPE = load_recipe(ROOT / "recipes" / "tiny_moe.yaml")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with random weights, as the trainer writes it at the end of a run."""
    return write_random_model(RECIPE, tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def url(exported: Path) -> Iterator[str]:
    with plain_server(exported, exported.parent / "server.log") as address:
        yield address


def test_transformers_and_vllm_chat_alike(exported: Path, url: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(exported)
    model: Any = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = inputs["input_ids"][0].tolist()
    assert prompt == load_tokenizer(RECIPE.tokenizer, None).encode_prompt(QUESTION)
    said = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0].tolist()[len(prompt) :]
    request = {"model": NAME, "messages": chat, "temperature": 0.0, "max_tokens": 12, "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=request, timeout=HANG)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["prompt_token_ids"] == prompt
    (choice,) = body["choices"]
    assert choice["token_ids"] == said and len(said) > 0
    assert choice["message"]["content"] == tokenizer.decode(said, skip_special_tokens=True)


def test_both_stop_at_the_stop_id(exported: Path, url: str) -> None:
    """Its logit is raised above all others: what is sampled first is the stop id, and nothing follows."""
    stop = load_tokenizer(RECIPE.tokenizer, None).stop_ids[0]
    chat = [{"role": "user", "content": QUESTION}]
    request = {"model": NAME, "messages": chat, "temperature": 0.0, "max_tokens": 12, "logit_bias": {str(stop): 100}}
    (choice,) = httpx.post(f"{url}/v1/chat/completions", json=request, timeout=HANG).json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == ""
    model: Any = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    ids = torch.tensor([load_tokenizer(RECIPE.tokenizer, None).encode_prompt(QUESTION)])
    said = model.generate(ids, do_sample=False, max_new_tokens=12, sequence_bias=[[[stop], 100.0]])
    assert said[0].tolist() == [*ids[0].tolist(), stop]
