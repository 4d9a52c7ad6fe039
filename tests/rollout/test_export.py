"""A model that a run leaves behind: transformers and a plain vLLM server chat with it, and say the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo_megatron.cluster.free_ports import free_ports
from gspo_megatron.commands.train_run import prepare_run
from gspo_megatron.data.model_directory import write_tokenizer
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import Piece, hf_shapes
from gspo_megatron.policy.weights import random_pieces, save_hf
from gspo_megatron.run_dir import RunDir
from tests.places import ROOT
from tests.rollout.conftest import answers
from tests.waiting import HANG, wait_until

pytestmark = pytest.mark.timeout(600)
QUESTION = "What is 12 + 30?"
RECIPE = load_recipe(ROOT / "recipes" / "tiny_moe.yaml")
ARGUMENTS = (
    "--dtype=float32", "--max-model-len=64", "--enforce-eager", "--kv-cache-memory-bytes=67108864", "--max-num-seqs=4",
    "--no-enable-chunked-prefill", "--disable-uvicorn-access-log",
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with random weights, as the trainer writes it at the end of a run."""
    directory = tmp_path_factory.mktemp("export")
    run = directory / "run"
    prepare_run(RECIPE.model_copy(update={"run": RECIPE.run.model_copy(update={"directory": run})}))
    read = random_pieces(RECIPE.arch, 1)
    tensors = (
        (name, read(Piece(name, (0, shape[0]), (0, shape[1]) if len(shape) == 2 else None, (0, shape[0]))))
        for name, shape in hf_shapes(RECIPE.arch).items()
    )
    config = RECIPE.arch.to_hugging_face(RECIPE.model.dtype)
    final = RunDir(run).final
    save_hf(tensors, config, final, complete=lambda place: write_tokenizer(RECIPE, RunDir(run).tokenizer, place))
    return final


@pytest.fixture(scope="module")
def url(exported: Path) -> Iterator[str]:
    """A vLLM server that knows nothing of this package."""
    (port,) = free_ports(1)
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1", "VLLM_HOST_IP": "127.0.0.1",
    }  # fmt: skip
    where = ["--model", str(exported), "--served-model-name", "mine", "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *where, *ARGUMENTS]
    log = exported.parent / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    def assert_lives() -> None:
        assert process.poll() is None, log.read_text()[-3000:]

    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}"), "the server", assert_lives)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(HANG)


def test_transformers_and_vllm_chat_alike(exported: Path, url: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(exported)
    model: Any = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = inputs["input_ids"][0].tolist()
    assert prompt == load_tokenizer(RECIPE.tokenizer, None).encode_prompt(QUESTION)
    said = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0].tolist()[len(prompt) :]
    request = {"model": "mine", "messages": chat, "temperature": 0.0, "max_tokens": 12, "return_token_ids": True}
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
    request = {"model": "mine", "messages": chat, "temperature": 0.0, "max_tokens": 12, "logit_bias": {str(stop): 100}}
    (choice,) = httpx.post(f"{url}/v1/chat/completions", json=request, timeout=HANG).json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == ""
    model: Any = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    ids = torch.tensor([load_tokenizer(RECIPE.tokenizer, None).encode_prompt(QUESTION)])
    said = model.generate(ids, do_sample=False, max_new_tokens=12, sequence_bias=[[[stop], 100.0]])
    assert said[0].tolist() == [*ids[0].tolist(), stop]
